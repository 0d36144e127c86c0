"""The device seam: torch stays as it was, megatron.core is compiled for the device."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modellink.config import ConfigError
from modellink.config.settings import parse_settings
from modellink.device.base import Device
from modellink.device.cpu import CpuDevice
from modellink.device.cuda import CudaDevice, GraphCapture, driver_version
from modellink.device.npu import NpuDevice
from modellink.device.retarget import Rewrite
from modellink.device.select import describe_devices, select_device
from modellink.device.specs import find_spec, peak_line
from modellink.runtime import prepare_run

REPO = Path(__file__).resolve().parent.parent

SNAPSHOT = '''
import sys, torch, torch.distributed, torch.optim, torch.utils.checkpoint, torch._higher_order_ops
import torch._dynamo, torch.distributed.tensor  # lazy parts of torch that change torch themselves when they load

def snapshot():
    seen = {}
    for name, module in list(sys.modules.items()):
        if module is not None and (name == "torch" or name.startswith("torch.")):
            for key, value in list(vars(module).items()):
                if not key.startswith("__") and key not in ("_initialized", "_queued_calls"):
                    seen[name, key] = id(value)
    for cls in (torch.Tensor, torch.nn.Module, torch.nn.Parameter, torch.optim.Optimizer):
        for key, value in vars(cls).items():
            seen[cls.__name__, key] = id(value)
    return seen

before = snapshot()
import pretrain_gpt
code = pretrain_gpt.main(sys.argv[1:])
after = snapshot()
functions = {key for key in before if key in after and before[key] != after[key]
             and callable(getattr(sys.modules.get(key[0], torch), key[1], None))}
classes = {key for key in before if key[0] in ("Tensor", "Module", "Parameter", "Optimizer")
           and before[key] != after.get(key)}
assert torch.cuda.is_available.__module__ == "torch.cuda"
print("changed", sorted(functions | classes), "code", code)
'''


def test_training_leaves_torch_as_it_was(tmp_path: Path) -> None:
    from tiny import tiny_config

    tiny_config().save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--mock-data", "--seq-length", "16", "--train-iters", "2",
                 "--lr", "1e-3", "--global-batch-size", "2", "--eval-iters", "0", "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", SNAPSHOT, *arguments], cwd=REPO, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "changed [] code 0"


def rewritten(source: str, name: str) -> str:
    return ast.unparse(ast.fix_missing_locations(Rewrite(name).visit(ast.parse(source))))


@pytest.mark.parametrize(("source", "name", "expected"), [
    ("torch.cuda.synchronize()", "cpu", "__accelerator__.synchronize()"),
    ("x = y.cuda()", "cpu", "x = y.to(__accelerator__.current_device())"),
    ("y.cuda(non_blocking=True)", "npu", "y.to(__accelerator__.current_device(), non_blocking=True)"),
    ("torch.empty(1, device='cuda')", "npu", "torch.empty(1, device='npu')"),
    ("t.type() == 'torch.cuda.FloatTensor'", "cpu", "t.type() == 'torch.FloatTensor'"),
    ("t.type() == 'torch.cuda.HalfTensor'", "npu", "t.type() == 'torch.npu.HalfTensor'"),
    ("other.cudart(); torch.cudnn", "cpu", "other.cudart()\ntorch.cudnn"),
])
def test_rewrite(source: str, name: str, expected: str) -> None:
    assert rewritten(source, name) == expected


def test_import_of_modellink_is_light() -> None:
    code = ("import sys, modellink, modellink.config.settings, modellink.cli; "
            "print('torch' in sys.modules, 'megatron' in sys.modules, len(sys.meta_path))")
    plain = subprocess.run([sys.executable, "-c", "import sys; print(len(sys.meta_path))"], capture_output=True,
                           text=True)
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False", plain.stdout.strip()], done.stderr


def test_auto_takes_a_usable_device_and_asking_for_another_says_why() -> None:
    chosen = select_device("auto")
    assert chosen.unusable_reason() is None
    assert any(line.startswith("cpu: usable") for line in describe_devices())
    for name in ("npu", "cuda"):
        line = next(line for line in describe_devices() if line.startswith(name))
        if "not usable" in line:
            with pytest.raises(ConfigError) as error:
                select_device(name)
            assert len(error.value.problems) == 1
            assert error.value.problems[0].startswith(f"--device {name}: ")


@pytest.mark.parametrize("value, advice", [
    (None, "check the driver with nvidia-smi"),
    ("7", "CUDA_VISIBLE_DEVICES is set to '7': compare it with the GPUs that nvidia-smi lists"),
    ("", "CUDA_VISIBLE_DEVICES is set to '', which hides every device")])
@pytest.mark.parametrize("words", [None, "No CUDA GPUs are available\nmore"])
def test_a_variable_that_may_hide_the_gpus_is_named(value: str | None, advice: str, words: str | None,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """torch answers as on a machine whose only GPU has number 0; with words of the driver and without."""
    def init() -> None:
        if words is not None:
            raise RuntimeError(words)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    reason = CudaDevice().unusable_reason()
    assert reason is not None and advice in reason and "\n" not in reason
    if value != "":
        said = "torch sees no usable GPU" if words is None else f"CUDA does not start ({words.splitlines()[0]})"
        assert reason == f"{said}; {advice}"


@pytest.mark.parametrize("content, version", [
    ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC", "535.129.03"),
    ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n", "580.95.05"),
    ("something else", "unknown"), (None, "unknown")])
def test_the_version_of_nvidias_driver(content: str | None, version: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "version").write_text(content)
    assert driver_version(tmp_path / "version") == version


def test_what_devices_say_of_graphs() -> None:
    devices: list[Device] = [CpuDevice(), NpuDevice(), CudaDevice()]
    assert [device.graph_recorder for device in devices] == [None, None, GraphCapture]


def test_attention_of_many_lengths_makes_no_plans() -> None:
    """cuDNN's kernel is planned for every new shape; a CPU and an NPU have nothing of the kind."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for kind, expected in ((CpuDevice, before), (NpuDevice, before), (CudaDevice, False)):
            kind().vary_lengths()
            assert torch.backends.cuda.cudnn_sdp_enabled() == expected
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_unknown_hardware_has_no_peak_rate() -> None:
    assert find_spec("cpu") is None
    assert find_spec("NVIDIA H200 MIG 1g.18gb") is None
    spec = find_spec("NVIDIA H200")
    assert spec is not None and spec.bf16_flops == 989e12


def no_gpu() -> None:
    raise RuntimeError("No CUDA GPUs are available")


@pytest.mark.parametrize(("words", "mine", "expected"), [
    (["--device", "cuda", "--tensor-model-parallel-size", "2"], None, "1"),
    (["--device", "auto", "--tensor-model-parallel-size", "2"], None, "1"),
    (["--device", "cuda", "--tensor-model-parallel-size", "2"], "8", "8"),  # the user's wins
    (["--device", "cuda"], None, None),
    (["--device", "cuda", "--tensor-model-parallel-size", "2", "--use-symm-mem"], None, None),  # in two streams
    (["--device", "cpu", "--tensor-model-parallel-size", "2"], None, None),
])
def test_kernels_are_ordered_before_cuda_starts(monkeypatch: pytest.MonkeyPatch, words: list[str], mine: str | None,
                                                expected: str | None) -> None:
    """CUDA_DEVICE_MAX_CONNECTIONS, as it stands when the first question to the driver is asked."""
    seen: list[str | None] = []
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", mine or "")  # so that it is as before after the test
    if mine is None:
        del os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # an empty one would be the reason instead
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available",
                        lambda: seen.append(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")) or False)
    monkeypatch.setattr(torch.cuda, "init", no_gpu)
    settings = parse_settings("pretrain_gpt.py", "", ["--model", "qwen15-0.5b", "--mock-data", "--seq-length", "64",
                                                      "--train-iters", "1", "--lr", "1e-3", *words])
    if "cuda" in words:
        with pytest.raises(ConfigError, match="CUDA does not start"):
            prepare_run(settings, 2, "train")
    else:
        prepare_run(settings, 2, "train")
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == expected
    assert all(value == expected for value in seen) and (seen or "cpu" in words)


@pytest.mark.parametrize("name, tera", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H800", 989),
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A800-SXM4-80GB", 312), ("NVIDIA L40S", 362.05), ("NVIDIA B200", 2250),
    ("NVIDIA GB200", 2500), ("NVIDIA GeForce RTX 4090", 165.2), ("Ascend910B1", 354), ("Ascend910B2C", 354),
    ("Ascend910B3", 295), ("Ascend910B4", 246), ("Ascend910_9392", 376), ("Ascend910A", 256),
    # others whose names are alike
    ("NVIDIA H200 NVL", 835.0),
    ("NVIDIA L40", None), ("NVIDIA H20", None), ("NVIDIA GH200 480GB", None), ("NVIDIA GeForce RTX 4090 D", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA A10", None), ("Ascend910B", None), ("Ascend310P3", None),
    ("Ascend950", None)])
def test_peak_rates_by_product(name: str, tera: float | None) -> None:
    """Rates of matrix products in bf16, without sparsity and with sums in fp32."""
    spec = find_spec(name)
    assert (spec and spec.bf16_flops) == (tera and tera * 1e12)


def test_the_log_says_what_the_mfu_is_of() -> None:
    assert peak_line("NVIDIA H200") == (
        "MFU is the share of 989 TFLOP/s (NVIDIA H200 datasheet: 989 TFLOP/s dense BF16, 141 GB)")
    assert peak_line("NVIDIA H200", "fp32") == "MFU is n/a: the peak rates are those of bf16 and fp16"
    assert peak_line("cpu") == "MFU is n/a: no peak rate of cpu is known"


def test_rates_of_ascend_follow_from_their_cubes() -> None:
    for name, cubes, clock in (("Ascend910B2", 24, 1.8e9), ("Ascend910B3", 20, 1.8e9), ("Ascend910B4", 20, 1.5e9)):
        spec = find_spec(name)
        assert spec is not None and spec.bf16_flops == pytest.approx(cubes * 16**3 * 2 * clock, rel=1e-3)
