"""The CUDA path at the sizes of the real models, on fake cuda tensors: devices, dtypes, the kernels asked for, and
where the host waits for the device. No numbers: those are the business of the other proofs (docs/cuda.md)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
from test_training_instruction import write_streams

pytestmark = pytest.mark.skipif(fake_cuda.missing() is not None, reason=str(fake_cuda.missing()))

BF16, FP32 = [["cuda:0", "torch.bfloat16"]], [["cuda:0", "torch.float32"]]
BATCH = ["send", "modellink/device/copies.py queued_copy"]  # from pinned memory; neighbours count once
# behind the last kernel of the backward: the number of tokens, the gradient's norm, the loss, the loss scale
END = [["read", "megatron/core/distributed/finalize_model_grads.py finalize_model_grads"],
       ["read", "megatron/core/optimizer/clip_grads.py get_grad_norm_fp32"],
       ["read", "modellink/training/step.py reduce_reports"],
       ["read", "modellink/training/loop.py step"]]
CHOOSE = ["read", "modellink/inference/generation.py _choose_tokens"]
FLASH, EFFICIENT = "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention"
VARLEN = "torch_attn::_varlen_attn"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fake")
    write_streams(folder / "data")
    environment = dict(os.environ, OMP_NUM_THREADS="1", TORCH_DEVICE_BACKEND_AUTOLOAD="0", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([sys.executable, str(fake_cuda.HERE / "fake_cuda_worker.py"), str(fake_cuda.build(folder)),
                           str(folder)], env=environment, cwd=fake_cuda.REPO, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((Path(folder) / "found.json").read_text())


# parameters: whole models from the tables of their config.json, a few layers of the others by the same sums
LAYERS_7B = 2 * (4 * 4096**2 + 3 * 4096 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 151936 * 4096 + 4096
LORA_7B = 2 * 8 * (4 * 2 * 4096 + 3 * (4096 + 11008))  # rank 8 for query, key, value, projection, gate, up and down
PARAMETERS = {
    "0.5b": 463_987_712, "7b": LAYERS_7B, "7b lora": LAYERS_7B + LORA_7B,
    "110b packed": 2 * (2 * 8192**2 + 2 * 8192 * 1024 + 8192 + 2 * 1024 + 3 * 8192 * 49152 + 2 * 8192)
    + 2 * 152064 * 8192 + 8192}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_training_step(name: str, found: dict[str, Any]) -> None:
    """The loop's own step: weights, main gradients and moments on the device in their dtypes, fused kernels."""
    got = found["training"][name]
    assert got["parameters"] == PARAMETERS[name]
    assert got["weights"] == BF16 and got["main_grads"] == got["moments"] == FP32 and got["skipped"] == 0
    attention = {VARLEN, f"{VARLEN}_backward"} if name == "110b packed" else {FLASH, f"{FLASH}_backward"}
    assert attention | {"aten::_fused_adamw_"} <= set(got["operators"])
    assert not [name for name in got["operators"] if "softmax" in name]  # scores that a kernel does not keep to itself


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_host_waits_only_at_the_ends_of_a_training_step(name: str, found: dict[str, Any]) -> None:
    # a microbatch is sent when it is needed; what neighbours share is written down once
    packed = [BATCH, ["send", "modellink/ops/cuda/library.py boundaries"]]
    microbatches = packed * 2 if name == "110b packed" else [BATCH]
    assert found["training"][name]["seen"] == [*microbatches, *END]


@pytest.mark.parametrize("name", ["7b", "110b", "7b int8"])
def test_generation(name: str, found: dict[str, Any]) -> None:
    """A pass sends its tokens and their places and reads the chosen tokens; nothing in between."""
    got = found["generation"][name]
    # prompts that begin alike are read one behind the other: two passes, and a step for each further token
    assert got["steps"] == [BATCH, CHOOSE] * 13
    assert got["prompt in parts"] == [BATCH, CHOOSE] * 12
    for case in ("steps", "prompt in parts", "recorded"):  # rows of other lengths, a prompt at an offset
        used = set(got["operators"][case])
        assert VARLEN in used and EFFICIENT not in used
        assert not [name for name in used if "softmax" in name]
    assert FLASH in got["operators"]["steps"]


@pytest.mark.parametrize("name", ["7b", "110b", "7b int8"])
def test_sampling_beams_and_scores(name: str, found: dict[str, Any]) -> None:
    got = found["generation"][name]
    assert got["sampled"] == [BATCH, CHOOSE] * 12  # penalties, cuts and the draw: nothing is read before the token
    assert got["beams"] == [BATCH, ["read", "modellink/inference/beams.py propose"]] * 12
    assert [kind for kind, _ in got["scores"]] == ["send", "read"]


@pytest.mark.parametrize("name", ["7b", "110b", "7b int8"])
def test_a_recorded_step_moves_nothing_between_host_and_device(name: str, found: dict[str, Any]) -> None:
    """As CUDA demands of what a graph records; a launch then copies its inputs, and nothing else of the host."""
    got = found["generation"][name]
    assert got["recordings"] and not any(got["recordings"])
    assert got["recorded"] == [BATCH, CHOOSE] * 13
