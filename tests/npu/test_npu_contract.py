"""Our calls of torch_npu against what torch_npu registers, lists and checks itself."""

from npu_environment import require_simulation

require_simulation()

import ast  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import npu_contracts  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch_npu  # noqa: E402
import torch_npu.op_plugin.meta._meta_registrations as meta_kernels  # noqa: E402
import yaml  # noqa: E402
from kernels import npu_kernels  # noqa: E402
from ladder import REPO  # noqa: E402
from old_schemas import VERSIONS  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402

from modellink.device import npu  # noqa: E402
from modellink.device.select import select_device  # noqa: E402
from modellink.doctor import main as doctor  # noqa: E402
from modellink.ops.npu.calls import CALLS, Call  # noqa: E402

OWN_LIST = Path(torch_npu.__file__).parent / "csrc/aten/npu_native_functions_by_codegen.yaml"
OLD_LISTS = [Path(sys.prefix) / "schemas" / f"{version}.yaml" for version in VERSIONS]


def schema_problem(schema: Any, call: Call) -> str | None:
    """None when a call fits a schema: enough leading arguments of the right kind, known keywords, nothing missing."""
    arguments = [argument for argument in schema.arguments if not argument.is_out]
    names = [argument.name for argument in arguments]
    leading, rest = arguments[:call.tensors], arguments[call.tensors:]
    if len(leading) < call.tensors or any(argument.kwarg_only for argument in leading):
        return f"takes fewer than {call.tensors} arguments by position"
    unknown = set(call.keywords) - {argument.name for argument in rest}
    if unknown:
        return f"has no {', '.join(sorted(unknown))} in {names}"
    missing = {argument.name for argument in rest if not argument.has_default_value()} - set(call.keywords)
    return f"also needs {', '.join(sorted(missing))}" if missing else None


def listed_schemas(path: Path) -> dict[str, list[Any]]:
    """Operator name -> schemas in the YAML of a wheel; only those we ask for are parsed."""
    found: dict[str, list[Any]] = {}
    for section in yaml.safe_load(path.read_text(encoding="utf-8")).values():
        for item in section if isinstance(section, list) else ():
            line = item.get("func", "") if isinstance(item, dict) else ""
            name = line.split("(")[0]
            if name in {call.operator for call in CALLS}:
                found.setdefault(name, []).append(torch._C.parse_schema(f"npu::{line}"))
    return found


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.operator}-{len(call.keywords)}")
def test_call_fits_the_registered_schema(call: Call) -> None:
    assert schema_problem(getattr(torch.ops.npu, call.operator).default._schema, call) is None


@pytest.mark.parametrize("path", [OWN_LIST, *OLD_LISTS], ids=lambda path: path.stem[:8])
def test_call_fits_the_lists_of_releases(path: Path) -> None:
    assert path.exists(), f"not fetched; run {sys.executable} {REPO / 'tests/npu/old_schemas.py'} {path.parent}"
    listed = listed_schemas(path)
    problems = {call.operator: [schema_problem(schema, call) for schema in listed.get(call.operator, ())]
                for call in CALLS}
    # in 2.6 and 2.7 the product that adds to fp32 does not exist; the choice of forms asks has_operator
    absent = {name for name, found in problems.items() if not found}
    assert absent <= {"npu_grouped_matmul_add_"}
    assert not {name: found for name, found in problems.items() if found and None not in found}


def test_a_wrong_call_would_be_noticed() -> None:
    schema = torch.ops.npu.npu_rms_norm.default._schema
    assert schema_problem(schema, Call("npu_rms_norm", 2, ("eps",))) is not None
    assert schema_problem(schema, Call("npu_rms_norm", 1, ("epsilon",))) is not None
    with pytest.raises(RuntimeError, match="eps"):
        torch_npu.npu_rms_norm(torch.ones(2, 4, device="meta"), torch.ones(4, device="meta"), eps=1e-6)


@pytest.mark.parametrize("line", npu_contracts.SCHEMAS, ids=lambda line: line.split("(")[0])
def test_operator_contract_is_a_part_of_the_registered_schema(line: str) -> None:
    """Every argument of the contracts of `make test` is registered, with the same type, default and order."""
    contract = torch._C.parse_schema(f"npu::{line}")
    registered = getattr(torch.ops.npu, contract.name.split("::")[1]).default._schema
    known = [argument for argument in registered.arguments if argument.name in {a.name for a in contract.arguments}]
    renamed = {"self": "input"}  # what torch-npu calls self in its lists is registered as input
    expected = [(renamed.get(a.name, a.name), str(a.type), a.default_value, a.kwarg_only) for a in contract.arguments]
    known = [argument for argument in registered.arguments if argument.name in {name for name, *_ in expected}]
    assert [(a.name, str(a.type), a.default_value, a.kwarg_only) for a in known] == expected


def operator_samples() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Operator, with a few words -> arguments on the CPU; also of the backward operators that only torch_npu calls."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    causal: dict[str, Any] = {"atten_mask": mask, "sparse_mode": 2}
    ends = {"actual_seq_qlen": [5, 12], "actual_seq_kvlen": [5, 12]}
    x, sbh, tnd = draw(12, 2, 64), [draw(12, 2, n * 16) for n in (4, 2, 2)], [draw(12, n, 16) for n in (4, 2, 2)]
    rows, step = [draw(2, n, 12, 16) for n in (4, 2, 2)], draw(2, 4, 1, 16)
    found: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "npu_rms_norm": ((x, draw(64)), {"epsilon": 1e-6}),
        "npu_rms_norm_backward": ((x, x, draw(64), draw(12, 2, 1, dtype=torch.float32)), {}),
        "npu_rotary_mul": ((draw(12, 2, 4, 16), draw(12, 1, 1, 16), draw(12, 1, 1, 16)), {}),
        "npu_rotary_mul by row": ((draw(12, 2, 4, 16), draw(12, 2, 1, 16), draw(12, 2, 1, 16)), {}),
        "npu_swiglu": ((x,), {"dim": -1}),
        "npu_swiglu_backward": ((draw(12, 2, 32), x), {"dim": -1}),
        "npu_fusion_attention SBH": ((*sbh, 4, "SBH"), {**causal, "scale": 0.25}),
        "npu_fusion_attention TND": ((*tnd, 4, "TND"), {**causal, **ends, "scale": 0.25}),
        "npu_fused_infer_attention_score prefill": (tuple(rows), {
            **causal, "sparse_mode": 3, "num_heads": 4, "num_key_value_heads": 2, "scale": 0.25,
            "input_layout": "BNSD"}),
        "npu_fused_infer_attention_score step": ((step, *rows[1:]), {
            "atten_mask": torch.zeros(2, 1, 1, 12, dtype=torch.bool), "num_heads": 4, "num_key_value_heads": 2,
            "scale": 0.25, "input_layout": "BNSD"}),
        "npu_fused_infer_attention_score lengths": ((step, *rows[1:]), {
            "actual_seq_lengths_kv": [12, 7], "num_heads": 4, "num_key_value_heads": 2, "scale": 0.25,
            "input_layout": "BNSD"}),
        "npu_grouped_matmul_add_": ((draw(1, 24, 16, dtype=torch.float32), draw(12, 24), draw(12, 16),
                                     torch.tensor([12])), {}),
    }
    for layout, tensors in (("SBH", sbh), ("TND", tnd)):
        arguments, options = found[f"npu_fusion_attention {layout}"]
        out, top, total, *_ = npu_kernels()["npu_fusion_attention"](*arguments, **options)
        found[f"npu_fusion_attention_grad {layout}"] = ((*tensors, out, 4, layout), {
            **{name: value for name, value in options.items() if name != "scale"}, "scale_value": 0.25,
            "softmax_max": top, "softmax_sum": total, "attention_in": out})
    return found


@pytest.mark.parametrize("name", operator_samples())
def test_our_kernel_gives_the_shapes_and_dtypes_of_torch_npu(name: str) -> None:
    """What the simulated device computes looks like what torch_npu announces for fake tensors."""
    meta_kernels._npu_fusion_attention_warning_printed = True  # it would ask the device for its name to give advice
    arguments, options = operator_samples()[name]
    operator = name.split()[0]
    got = npu_kernels()[operator](*arguments, **options)
    announced = getattr(torch.ops.npu, operator)(*tree_map_only(torch.Tensor, lambda x: x.to("meta"), arguments),
                                                 **tree_map_only(torch.Tensor, lambda x: x.to("meta"), options))

    def looks(result: Any) -> list[Any]:
        tensors = [result] if isinstance(result, torch.Tensor) else list(result)
        return [(tuple(x.shape), x.dtype) for x in tensors if isinstance(x, torch.Tensor) and x.numel()]

    assert looks(got) == looks(announced)


def test_mc2_announces_our_shapes() -> None:
    x, weight = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((6, 256), (256, 10)))
    product, whole = torch_npu.npu_all_gather_base_mm(x, weight, "name", 2, gather_output=True)
    assert (tuple(product.shape), tuple(whole.shape), product.dtype) == ((12, 10), (12, 256), torch.bfloat16)
    out = torch_npu.npu_mm_reduce_scatter_base(x, weight, "name", 2, reduce_op="sum")
    assert (tuple(out.shape), out.dtype) == ((3, 10), torch.bfloat16)


def test_the_device_asks_torch_npu_for_what_it_has() -> None:
    """Every attribute of torch.npu that modellink.device names."""
    asked = set()
    for node in ast.walk(ast.parse(Path(npu.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == "namespace":
            asked.add(node.attr)
    assert len(asked) >= 8
    assert [name for name in sorted(asked) if not hasattr(torch.npu, name)] == []


def test_the_fused_optimizer_has_a_kernel() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_adamw_", "PrivateUse1")


def test_the_device_is_usable_and_says_what_it_is() -> None:
    device = select_device("npu")
    assert device.count() == 2 and device.product_name() == "Ascend910B1" and device.free_memory() > 0
    libraries = device.libraries()
    assert libraries["torch_npu"].startswith("2.13.0")
    assert libraries["CANN"] == libraries["driver"] == "unknown"  # there is neither; torch_npu has been asked
    place = device.set_current(1)
    tensor = torch.empty(1000, device=place)
    assert device.current() == place == tensor.device and device.peak_memory() >= 4000
    state = device.rng_state()
    device.set_rng_state(state)
    assert torch.equal(device.rng_state(), state)
    device.set_current(0)
    device.synchronize()


def test_no_device_is_one_sentence() -> None:
    code = ("from modellink.config import ConfigError; from modellink.device.select import select_device\n"
            "try: select_device('npu')\nexcept ConfigError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO,
                          env=dict(os.environ, NPU_STUB_DEVICES="0"))
    assert "--device npu: torch_npu sees no usable NPU" in done.stdout, done.stderr


def test_doctor_says_which_forms_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(["--device", "npu"]) == 0
    said = capsys.readouterr().out
    for words in ("npu: usable, 2 visible, Ascend910B1", "chosen: npu", "torch_npu: 2.13.0", "rms_norm: npu_rms_norm\n",
                  "rotary: npu_rotary_mul\n", "swiglu: npu_swiglu\n", "attention: npu_fusion_attention (SBH",
                  "cached_attention: npu_fused_infer_attention_score (BNSD)\n", "adamw: torch's fused AdamW\n",
                  "not MC2, npu_all_gather_base_mm: --use-mc2 is off", "mindspeed: not installed; used: npu_matmul_add",
                  "apex: not installed; used: nothing of it"):
        assert words in said, words


ASKED = r"aclnn\w+.* not in|OPS function error: \w+"


def heads(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="npu")


def attend(layout: str, query: torch.Tensor, **options: Any) -> Any:
    return torch_npu.npu_fusion_attention(query, query, query, head_num=8, input_layout=layout, scale=0.125, **options)


def attend_rows(query: torch.Tensor, layout: str = "BNSD", count: int = 4) -> Any:
    rows = heads(2, 2, 12, 16)
    return torch_npu.npu_fused_infer_attention_score(query, rows, rows, num_heads=count, num_key_value_heads=2,
                                                     input_layout=layout)


def gather(*shape: int, ranks: int = 2) -> Any:
    return torch_npu.npu_all_gather_base_mm(heads(*shape), heads(256, 10), "group", ranks, gather_output=True)


def scatter(tokens: int) -> Any:
    return torch_npu.npu_mm_reduce_scatter_base(heads(tokens, 256), heads(256, 10), "group", 2, reduce_op="sum")


def sampled(name: str) -> Any:
    arguments, options = tree_map_only(torch.Tensor, lambda x: x.npu(), operator_samples()[name])
    return getattr(torch.ops.npu, name.split()[0])(*arguments, **options)


GOOD: dict[str, Callable[[], Any]] = {
    "npu_all_gather_base_mm": lambda: gather(6, 256), "npu_mm_reduce_scatter_base": lambda: scatter(6),
    **{name: partial(sampled, name) for name in operator_samples()}}
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown layout": (lambda: attend("XYZ", heads(128, 2, 512)), "layout"),
    "nothing kept": (lambda: attend("SBH", heads(128, 2, 512), keep_prob=0.0), "keep_prob"),
    "mode of TND only": (lambda: attend("SBH", heads(128, 2, 512), sparse_mode=7), "sparse_mode"),
    "TND without lengths": (lambda: attend("TND", heads(128, 8, 64)), "actual_seq"),
    "a weight of more dimensions": (lambda: torch_npu.npu_rms_norm(heads(4, 64), heads(4, 4, 64)), "gamma shape"),
    "another rotation": (lambda: torch_npu.npu_rotary_mul(
        heads(12, 2, 4, 128), heads(12, 1, 1, 128), heads(12, 1, 1, 128), rotary_mode="other"), "rotary_mode"),
    "a dimension that is not there": (lambda: torch_npu.npu_swiglu(heads(4, 8), dim=5), "dim out of range"),
    "rows of an unknown layout": (lambda: attend_rows(heads(2, 4, 1, 16), layout="XYZ"), "layout"),
    "rows without heads": (lambda: attend_rows(heads(2, 4, 1, 16), count=0), "num_heads"),
    "rows of three dimensions": (lambda: attend_rows(heads(2, 4, 16)), "query's dim"),
    "a gather in three dimensions": (lambda: gather(2, 3, 256), "required to be 2D"),
    "a gather of other features": (lambda: gather(6, 128), "K-axis"),
    "a gather over three ranks": (lambda: gather(6, 256, ranks=3), "world_size should be in"),
    "a scatter with a rest": (lambda: scatter(7), "divisible by world_size"),
}


@pytest.mark.parametrize("name", GOOD)
def test_own_checks_of_torch_npu_accept(name: str) -> None:
    """A call that passes op-plugin's checks gets as far as asking for the kernel, which no stub has."""
    with pytest.raises(RuntimeError, match=ASKED):
        GOOD[name]()


@pytest.mark.parametrize("name", BAD)
def test_own_checks_of_torch_npu_refuse(name: str) -> None:
    call, word = BAD[name]
    with pytest.raises(RuntimeError, match=f"(?i){word}") as error:
        call()
    assert re.search(ASKED, str(error.value)) is None
