"""Whole Qwen1.5 models on fake npu tensors: a training step, and generation over a cache, through torch_npu's own
kernels for shapes and its own autograd nodes, at the sizes of the real models and without their memory."""

from npu_environment import require_simulation

require_simulation()

from collections.abc import Iterator  # noqa: E402
from contextlib import contextmanager, nullcontext  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch_npu.op_plugin.meta._meta_registrations as meta_kernels  # noqa: E402
from simulator import autograd_nodes, simulated_npu  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from modellink.config.settings import parse_settings  # noqa: E402
from modellink.device.base import Device  # noqa: E402
from modellink.models.run import Run  # noqa: E402
from modellink.parallel.groups import stop_groups  # noqa: E402
from modellink.runtime import prepare_run  # noqa: E402
from modellink.start import start  # noqa: E402

SEQUENCE = 4096
FAKE = "cpu:fake,npu:fake"  # torch itself knows it for other devices only
TP8 = "--tensor-model-parallel-size 8"
TP8SP = f"{TP8} --sequence-parallel"
# preset and layout: ranks, parameters of a rank. Whole models: from the tables of their config.json (0.5B ties its
# head). A rank of 8: an eighth of every matrix and of the biases of query, key and value, all of the norms.
PARAMETERS = {
    ("qwen15-0.5b", ""): (1, 463_987_712),
    ("qwen15-7b", ""): (1, 7_721_324_544),
    ("qwen15-72b", TP8SP): (8, (2 * 152064 * 8192 + 80 * (4 * 8192**2 + 3 * 8192 * 24576 + 3 * 8192)) // 8
                            + 161 * 8192),
    ("qwen15-110b", TP8SP): (8, (2 * 152064 * 8192 + 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 49152 + 8192
                                                         + 2 * 1024)) // 8 + 161 * 8192),
}
NODES = {"NpuRmsNormBackward0", "NpuSwigluBackward0", "NpuFusionAttentionBackward0"}


class Calls(TorchDispatchMode):
    """Counts the npu:: operators, and aten::cat."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "npu" or func is torch.ops.aten.cat.default:
            self.count[func.name()] = self.count.get(func.name(), 0) + 1
        return func(*args, **(kwargs or {}))


@contextmanager
def started(model: str, layout: str, ranks: int) -> Iterator[tuple[Run, Device]]:
    """Rank 0 of a job; with several ranks the others are made up, and their messages are what lies in memory."""
    line = (f"--model {model} {layout} --mock-data --seq-length {SEQUENCE} --bf16 --device npu --train-iters 1 "
            "--lr 1e-4 --global-batch-size 1")
    run = prepare_run(parse_settings("models", "", line.split()), ranks, "train")
    meta_kernels._npu_fusion_attention_warning_printed = True  # it would ask the device for its name to give advice
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(ranks))
        if ranks > 1:
            new_group = dist.new_group
            patch.setattr(dist, "new_group", lambda *args, **options: new_group(*args, **options | {"backend": FAKE}))
            dist.init_process_group(FAKE, rank=0, world_size=ranks, store=FakeStore())
        with simulated_npu():
            device = start(run)
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

        # its states are numbers in memory, which fake tensors do not have; the models have no dropout
        patch.setattr(CudaRNGStatesTracker, "fork", lambda *args: nullcontext())
        yield run, device
        stop_groups()


@pytest.mark.parametrize(("model", "layout"), PARAMETERS)
def test_forward_backward_and_step(model: str, layout: str) -> None:
    ranks, expected = PARAMETERS[model, layout]
    with started(model, layout, ranks) as (run, device):
        from modellink.models.build import build_chunks, transformer_config
        from modellink.models.forms import choose_forms
        from modellink.ops.adamw import FusedAdamW

        choose_forms(run, device)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device.current()):
            config = transformer_config(run, device.name, perform_initialization=False)
            chunk = build_chunks(run, config, device.name)[0]
            parameters = list(chunk.parameters())
            assert sum(parameter.numel() for parameter in parameters) == expected
            assert {(p.device.type, p.dtype) for p in parameters} == {("npu", torch.bfloat16)}
            tokens = torch.zeros(1, SEQUENCE, dtype=torch.int64)
            loss = chunk(tokens, torch.arange(SEQUENCE)[None], None, labels=tokens)
            assert loss.shape == (1, SEQUENCE) and loss.dtype == torch.float32 and loss.device.type == "npu"
            assert autograd_nodes(loss) >= NODES
            loss.sum().backward()
            assert all(p.grad is not None and p.grad.shape == p.shape and p.grad.device == p.device for p in parameters)
            optimizer = FusedAdamW(parameters, lr=1e-4)
            optimizer.step()
            states = [optimizer.state[p] for p in parameters]
            assert {(s["exp_avg"].device.type, s["exp_avg"].dtype) for s in states} == {("npu", torch.bfloat16)}


@pytest.mark.parametrize(("model", "layout", "ranks"), [("qwen15-7b", "", 1), ("qwen15-110b", TP8, 8)])
def test_prefill_and_decode_over_a_cache(model: str, layout: str, ranks: int) -> None:
    """A long prompt in two parts, then a step of rows of different lengths: shapes, dtypes and operators."""
    with started(model, layout, ranks) as (run, device):
        from modellink.inference.cache import Piece
        from modellink.inference.engine import Engine
        from modellink.models.build import build_chunks, transformer_config
        from modellink.models.forms import choose_forms

        choose_forms(run, device)
        layers, vocabulary = run.model.num_layers, run.model.vocab_size
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device.current()), Calls() as calls:
            config = transformer_config(run, device.name, perform_initialization=False)
            replica = Engine(build_chunks(run, config, device.name), run, device.current()).replica
            cache = replica.reserve(2, 2 * SEQUENCE)
            for pieces, wanted, passes in (
                    ([Piece(0, 0, [1] * SEQUENCE)], [SEQUENCE - 1], 1),
                    ([Piece(0, SEQUENCE, [2] * 7), Piece(1, 0, [3] * 5)], [6, 11], 2),
                    ([Piece(0, SEQUENCE + 7, [4]), Piece(1, 5, [5])], [0, 1], 1)):
                calls.count.clear()
                hidden = replica.run(cache, pieces, wanted)
                assert hidden is not None and hidden.shape == (len(wanted), run.model.hidden_size)
                # answers of several passes are joined; the table of the rotation is taken as it lies
                assert calls.count.get("aten::cat", 0) == (layers if passes > 1 else 0)
                logits = replica.logits(hidden)
                assert logits.shape == (len(wanted), vocabulary) and logits.device.type == hidden.device.type
                assert calls.count["npu::npu_fused_infer_attention_score"] == layers * passes
                assert calls.count["npu::npu_rms_norm"] == 2 * layers + 1
                assert calls.count["npu::npu_rotary_mul"] == calls.count["npu::npu_swiglu"] == layers
        assert cache.tokens == [[1] * SEQUENCE + [2] * 7 + [4], [3] * 5 + [5]]
