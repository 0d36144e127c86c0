"""On NVIDIA GPUs: operators, the parity ladder, resuming and generation equal the CPU and transformers.

`pytest -m cuda`; layouts of more ranks than there are GPUs are left out.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_environment import DEVICE, need_gpus
from inference_cases import MODELS as GENERATING
from inference_cases import NUM_NEW, PROMPTS, REPO, environment, make_place
from ladder import read_metrics, run_cases
from test_ops_reference import assert_same, leaf
from test_training_parity import (
    LAYOUTS,
    MODELS,
    NAMES,
    RECOMPUTE,
    STEPS,
    arguments,
    folder,  # noqa: F401
    transformers_loop,
)
from torch import Tensor
from transformers import Qwen2ForCausalLM

from modellink.ops import reference
from modellink.ops.attention import RowLengths, attend_rows, attention, lower_right
from modellink.ops.cross_entropy import vocab_parallel_cross_entropy
from modellink.ops.forms import Situation, forms_in_use
from modellink.ops.parallel_linear import accumulate_weight_gradient
from modellink.ops.rms_norm import rms_norm
from modellink.ops.rotary import apply_rotary, rotary_table
from modellink.ops.swiglu import swiglu
from modellink.ops.table import choose

pytestmark = pytest.mark.cuda
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# the sums of another chip run in another order; a wrong factor or a lost token is a hundred times more
CLOSE = {FP32: {"atol": 1e-4, "rtol": 1e-4}, BF16: {"atol": 4e-2, "rtol": 4e-2}, FP16: {"atol": 5e-3, "rtol": 5e-3}}
LOSS, NORM = {"abs": 1e-4}, {"rel": 1e-3}


@pytest.fixture(scope="module", autouse=True)
def a_gpu() -> None:
    """Before any other fixture makes weights and data."""
    need_gpus(1)


def on_device(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return leaf(*shape, dtype=dtype, seed=seed).detach().to(DEVICE).requires_grad_()


@pytest.fixture(params=[FP32, BF16, FP16], ids=str)
def dtype(request: pytest.FixtureRequest) -> Any:
    """With the forms that the table gives this device for this dtype and grouped queries of 64."""
    situation = Situation(DEVICE, dtype=request.param, head_dim=64, heads=6, groups=2, hidden=192, ffn=256)
    with forms_in_use(choose(situation), DEVICE):
        yield request.param


def test_pointwise_operators(dtype: torch.dtype) -> None:
    x, weight = on_device(9, 2, 192, dtype=dtype), on_device(192, dtype=dtype, seed=1)
    assert_same(lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: reference.rms_norm(x, w, 1e-6), x, weight,
                **CLOSE[dtype])
    assert_same(swiglu, reference.swiglu, on_device(9, 2, 512, dtype=dtype), **CLOSE[dtype])
    table = rotary_table(12, 64, 1e6, dtype=dtype, device=DEVICE, offset=2)[:, 3:]
    cos, sin, _ = table[:, :, None, None]
    assert_same(lambda x: apply_rotary(x, table), lambda x: reference.rotate(x, cos, sin),
                on_device(9, 2, 6, 64, dtype=dtype), **CLOSE[dtype])


def heads(queries: int, keys: int, groups: int, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (on_device(queries, batch, 6, 64, dtype=dtype), on_device(keys, batch, groups, 64, seed=1, dtype=dtype),
            on_device(keys, batch, groups, 64, seed=2, dtype=dtype))


@pytest.mark.parametrize(("queries", "keys"), [(130, 130), (1, 60), (3, 80)])
def test_attention(dtype: torch.dtype, queries: int, keys: int) -> None:
    assert_same(attention, reference.attention, *heads(queries, keys, 2, 2, dtype), **CLOSE[dtype])


def test_packed_attention(dtype: torch.dtype) -> None:
    ends = [0, 70, 71, 71, 200]
    assert_same(lambda *x: attention(*x, cu_seqlens=ends), lambda *x: reference.attention(*x, cu_seqlens=ends),
                *heads(200, 200, 2, 1, dtype), **CLOSE[dtype])


@pytest.mark.parametrize(("queries", "keys"), [(70, 70), (1, 60), (3, 80)])
def test_attention_over_a_cache(dtype: torch.dtype, queries: int, keys: int) -> None:
    query, key, value = (x.permute(1, 2, 0, 3).detach() for x in heads(queries, keys, 2, 2, dtype))
    rows = (torch.arange(keys) < torch.tensor([keys - 2, keys])[:, None])[:, None, None].to(DEVICE)
    for mask in (lower_right(queries, keys, query.device), rows):
        torch.testing.assert_close(attend_rows(query, key, value, mask),
                                   reference.attend_rows(query, key, value, mask), **CLOSE[dtype])


@pytest.mark.parametrize(("queries", "lengths"), [(1, [60, 33, 1]), (3, [60, 3, 41]), (50, [80])])
def test_rows_of_a_cache_by_their_lengths(dtype: torch.dtype, queries: int, lengths: list[int]) -> None:
    """Steps, and parts of a prompt: nothing behind the end of a row is seen."""
    query = on_device(len(lengths), 4, queries, 64, dtype=dtype).detach()
    memory = on_device(2, 4, 2, 100, 64, dtype=dtype, seed=1).detach()
    key, value = memory[:, :len(lengths)]
    ends = RowLengths(torch.tensor(lengths, dtype=torch.int32, device=DEVICE), max(lengths), lengths)
    places = ends.counts[:, None, None] - queries + torch.arange(queries, device=DEVICE)[:, None]
    seen = (torch.arange(max(lengths), device=DEVICE) <= places)[:, None]
    torch.testing.assert_close(attend_rows(query, key, value, seen, lengths=ends),
                               reference.attend_rows(query, key, value, seen, lengths=ends), **CLOSE[dtype])


def test_weight_gradient(dtype: torch.dtype) -> None:
    x, grad = on_device(300, 192, dtype=dtype).detach(), on_device(300, 256, dtype=dtype, seed=1).detach()
    total = on_device(256, 192, dtype=FP32, seed=2).detach()
    expected = total.clone()
    reference.accumulate_weight_gradient(x, grad, expected)
    accumulate_weight_gradient(x, grad, total)
    # a GPU rounds nothing to 16 bits; the CPU, which may run this test too, rounds the product
    is_exact = DEVICE == "cuda" or dtype == FP32
    close = CLOSE[FP32] if is_exact else {"atol": 0.2, "rtol": 1e-2}
    torch.testing.assert_close(total, expected, **close)


@pytest.mark.parametrize(("rows", "real"), [(1024, 1003), (9088, 9001)])
def test_cross_entropy(dtype: torch.dtype, rows: int, real: int) -> None:
    """Padding rows with large logits, masked and weighted tokens; the gradient is rounded once in any form."""
    logits = 3 * on_device(40, 2, rows, dtype=dtype).detach()
    logits[..., real:] = 60.0
    target = torch.randint(0, real, (40, 2), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    slope = on_device(40, 2, dtype=FP32, seed=2).detach()
    slope[1:9] = 0.0
    found = []
    for function in (vocab_parallel_cross_entropy, reference.vocab_parallel_cross_entropy):
        x = logits.clone().requires_grad_()
        loss = function(x * 1, target, None, real)
        (loss * slope).sum().backward()
        found.append((loss.detach(), x.grad))
    (loss, grad), (expected, slopes) = found
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad, slopes)
    assert grad is not None and not grad[..., real:].any()


def losses(records: list[dict]) -> list[float]:
    assert len(records) == STEPS
    return [record["loss"] for record in records]


@pytest.fixture(scope="module")
def losses_of_transformers(folder: Path) -> dict[str, tuple[list[float], list[float]]]:  # noqa: F811
    return {model: transformers_loop(folder, model) for model in MODELS}


@pytest.fixture(scope="module")
def ladder(folder: Path) -> dict[int, Path]:  # noqa: F811
    """World sizes whose cases have run in the folder of their metrics."""
    return {}


@pytest.mark.parametrize(("world", "layout"), NAMES)
def test_training_parity(world: int, layout: str, ladder: dict[int, Path], folder: Path,  # noqa: F811
                         losses_of_transformers: dict[str, tuple[list[float], list[float]]]) -> None:
    """Every layout, with and without recomputation, against a plain loop of transformers on the CPU."""
    need_gpus(world)
    keys = {(model, name, kind): f"cuda.{model}.{name}.{kind}" for model in MODELS for name in LAYOUTS[world]
            for kind in RECOMPUTE}
    if world not in ladder:
        run_cases([[*arguments(folder, model, label), *LAYOUTS[world][name], *RECOMPUTE[kind], "--device", DEVICE]
                   for (model, name, kind), label in keys.items()], world, folder)
        ladder[world] = folder
    for (model, name, _), label in keys.items():
        if name == layout:
            expected, norms = losses_of_transformers[model]
            records = read_metrics(folder / f"{label}.jsonl")
            assert losses(records) == pytest.approx(expected, **LOSS), label
            assert [record["grad_norm"] for record in records] == pytest.approx(norms, **NORM), label


def test_training_over_symmetric_memory(folder: Path,  # noqa: F811
                                        losses_of_transformers: dict[str, tuple[list[float], list[float]]]) -> None:
    """Two GPUs that reach each other's memory; on the CPU the flag has no effect."""
    need_gpus(2)
    (choice,) = [choice for choice in choose(Situation(
        DEVICE, dtype=FP32, tensor=2, is_sequence_parallel=True, wishes=frozenset({"use_symm_mem"})))
        if choice.operation == "row_linear"]
    if DEVICE == "cuda" and choice.form.run is None:
        pytest.skip(str(choice))
    run_cases([[*arguments(folder, "untied", "symmetric"), *LAYOUTS[2]["tp2-sp"], "--use-symm-mem", "--device",
                DEVICE]], 2, folder)
    expected, norms = losses_of_transformers["untied"]
    records = read_metrics(folder / "symmetric.jsonl")
    assert losses(records) == pytest.approx(expected, **LOSS)
    assert [record["grad_norm"] for record in records] == pytest.approx(norms, **NORM)


def test_training_in_16_bits_is_near_the_cpu(folder: Path) -> None:  # noqa: F811
    """bf16, and fp16 with its loss scale."""
    precisions = {"bf16": ["--bf16"], "fp16": ["--fp16", "--initial-loss-scale", "65536"]}
    for name in dict.fromkeys((DEVICE, "cpu")):
        run_cases([[*arguments(folder, "tied", f"{precision}.{name}"), *flags, "--device", name]
                   for precision, flags in precisions.items()], 1, folder)
    for precision in precisions:
        here, cpu = (losses(read_metrics(folder / f"{precision}.{name}.jsonl")) for name in (DEVICE, "cpu"))
        assert here == pytest.approx(cpu, abs=3e-2)


def test_a_resumed_run_goes_on_where_it_stopped(folder: Path) -> None:  # noqa: F811
    """Weights, moments, schedule, data and random numbers (dropout) come back."""
    def words(label: str, save: str) -> list[str]:
        return [*arguments(folder, "untied", f"resume.{label}"), "--hidden-dropout", "0.1", "--device", DEVICE,
                "--save", str(folder / save)]

    second = [word for word in words("second", "halves") if word != "--finetune"]
    second[1] = str(folder / "halves")
    run_cases([words("whole", "whole"), [*words("first", "halves"), "--exit-interval", "4"]], 1, folder)
    run_cases([second], 1, folder)
    whole = losses(read_metrics(folder / "resume.whole.jsonl"))
    halves = [record["loss"] for name in ("first", "second")
              for record in read_metrics(folder / f"resume.{name}.jsonl")]
    assert halves == pytest.approx(whole, **LOSS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("generation"))


@pytest.fixture(scope="module")
def generated(place: Path) -> dict[str, Any]:
    """What the engine answers, by model."""
    for name in GENERATING:
        done = subprocess.run([sys.executable, str(REPO / "tests" / "cuda_generation.py"), str(place), name],
                              env=environment(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-6000:]
    return {name: json.loads((place / f"{name}.json").read_text()) for name in GENERATING}


@pytest.mark.parametrize("name", GENERATING)
def test_recorded_steps_and_bf16(name: str, generated: dict[str, Any]) -> None:
    """CUDA graphs give the answers of steps launched one by one; bf16 (flash attention over rows of other lengths)
    the probabilities of fp32, as long as the words are the same."""
    assert not generated[name]["plans"] or DEVICE == "cpu"  # of cuDNN, one for every length
    plain, recorded, half, half_recorded = generated[name]["long"].values()
    for (tokens, logprobs), (others, more) in zip(plain, recorded, strict=True):
        assert tokens == others and logprobs == pytest.approx(more, abs=1e-4)
    for one, other in ((plain, half), (half, half_recorded)):
        for (tokens, logprobs), (others, more) in zip(one, other, strict=True):
            same = next((place for place, pair in enumerate(zip(tokens, others)) if pair[0] != pair[1]), len(tokens))
            assert logprobs[:same] == pytest.approx(more[:same], abs=5e-2)
        assert sum(tokens[0] == others[0] for (tokens, _), (others, _) in zip(one, other)) >= len(one) - 1


@pytest.mark.parametrize("name", GENERATING)
def test_generation_equals_transformers(name: str, place: Path, generated: dict[str, Any]) -> None:
    """Greedy answers in a batch whose rows have other lengths; prompts in chunks; likelihoods of given words."""
    found = generated[name]
    model = Qwen2ForCausalLM.from_pretrained(place / name)
    for prompt, tokens, logprobs in zip(PROMPTS, found["tokens"], found["logprobs"], strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False,
                                  eos_token_id=None, pad_token_id=0)[0, len(prompt):]
        assert tokens == expected.tolist()
        logits = model(torch.cat((ids, expected[None]), dim=1)).logits[0, len(prompt) - 1:-1].log_softmax(-1)
        assert logprobs == pytest.approx(logits.gather(1, expected[:, None])[:, 0].tolist(), abs=1e-3)
    assert found["chunked"] == found["tokens"] and found["device"] == DEVICE
