"""Every change to megatron-core: what, where, why, and when it can go.

Applied once by `apply_patches`, never on import.

The rewrite for the device itself, and the switched-off jit fuser, are in `modellink.device.retarget`.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from modellink.device.backends import group_place, reporting_start
from modellink.device.base import Device
from modellink.ops.adamw import FusedAdamW
from modellink.ops.embedding import embedding
from modellink.ops.gradients import multi_tensor_norm, multi_tensor_scale
from modellink.ops.parallel_linear import accumulate_weight_gradient, own_linear


@dataclass(frozen=True)
class Patch:
    """One change.

    Attributes:
        name: short name.
        target: the dotted name that changes.
        devices: devices it is applied on.
        core_versions: megatron-core versions it was tried with.
        why: what goes wrong without it.
        remove_when: the condition under which it is no longer needed.
        apply: makes the change for a device.
    """

    name: str
    target: str
    devices: tuple[str, ...]
    core_versions: str
    why: str
    remove_when: str
    apply: Callable[[Device], None]


def _rng_state(device: Device) -> None:
    module: Any = import_module("megatron.core.tensor_parallel.random")
    module._get_cuda_rng_state = lambda *args, **options: device.rng_state()
    module._set_cuda_rng_state = lambda state, *args, **options: device.set_rng_state(state)


def _fused_adam(device: Device) -> None:
    optimizer: Any = import_module("megatron.core.optimizer")
    distributed: Any = import_module("megatron.core.optimizer.distrib_optimizer")
    optimizer.Adam = FusedAdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed.Adam = FusedAdamW
    distributed.HAVE_APEX_OR_TE = True
    distributed.USING_APEX_OPTIMIZER = True


def _weight_gradient(device: Device) -> None:
    layers: Any = import_module("megatron.core.tensor_parallel.layers")
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate_weight_gradient,
                                                            wgrad_gemm_accum_fp16=accumulate_weight_gradient)
    layers._grad_accum_fusion_available = True


def _group_options(device: Device) -> None:
    state: Any = import_module("megatron.core.parallel_state")
    state.get_nccl_options = lambda group, configurations: device.group_options(group)


def _group_names(device: Device) -> None:
    state: Any = import_module("megatron.core.parallel_state")
    state.create_group = _naming_its_group(inspect.unwrap(state.create_group), device)


def _naming_its_group(of_core: Any, device: Device) -> Any:
    @functools.wraps(of_core)
    def create_group(ranks: list[int], **options: Any) -> Any:
        place = group_place(dist.get_rank(), options.get("group_desc") or "process group", ranks)
        with reporting_start(options.get("backend") or device.backend, device.name, place):
            return of_core(ranks, **options)

    return create_group


def _linear(device: Device) -> None:
    layers: Any = import_module("megatron.core.tensor_parallel.layers")
    for name in ("linear_with_grad_accumulation_and_async_allreduce", "linear_with_frozen_weight"):
        setattr(layers, name, _own_where_chosen(getattr(layers, name)))


def _own_where_chosen(of_core: Any) -> Any:
    @functools.wraps(of_core)
    def linear(input: Any, weight: Any, bias: Any, gradient_accumulation_fusion: bool, allreduce_dgrad: bool,
               sequence_parallel: bool, *rest: Any, **options: Any) -> Any:
        form = own_linear(input.device.type)
        if form is None or input.dtype != weight.dtype or allreduce_dgrad or sequence_parallel:
            return of_core(input, weight, bias, gradient_accumulation_fusion, allreduce_dgrad, sequence_parallel,
                           *rest, **options)
        return form(input, weight, bias, gradient_accumulation_fusion)

    return linear


def _embedding(device: Device) -> None:
    layers: Any = import_module("megatron.core.tensor_parallel.layers")
    layers.F = SimpleNamespace(embedding=embedding)  # all that the module takes of torch.nn.functional


def _clipping(device: Device) -> None:
    clipping: Any = import_module("megatron.core.optimizer.clip_grads")
    clipping.l2_norm_impl = multi_tensor_norm
    clipping.multi_tensor_scale_impl = multi_tensor_scale


ALL_DEVICES = ("cpu", "cuda", "npu")

LEDGER: tuple[Patch, ...] = (
    Patch("rng-state", "megatron.core.tensor_parallel.random._get_cuda_rng_state, _set_cuda_rng_state", ("cpu", "npu"),
          "0.16.1", "they reach into torch._C for CUDA generators, which the rewrite of names cannot redirect",
          "the core takes the state through its device's module", _rng_state),
    Patch("fused-adamw", "megatron.core.optimizer.Adam and four flags beside it", ALL_DEVICES, "0.16.1",
          "without Apex or TE the distributed optimizer cannot resume: it expects their optimizer's form of state",
          "the core accepts torch.optim.AdamW(fused=True) state on resume", _fused_adam),
    Patch("weight-gradient", "megatron.core.tensor_parallel.layers.fused_weight_gradient_mlp_cuda and the flag that it "
          "is there", ALL_DEVICES, "0.16.1",
          "--gradient-accumulation-fusion asks for an Apex extension; our operation adds to the main gradient instead",
          "the core takes the function from its configuration", _weight_gradient),
    Patch("group-options", "megatron.core.parallel_state.get_nccl_options", ("npu",), "0.16.1",
          "it makes options of NCCL's class; HCCL has its own, with the size of its buffers",
          "the core takes the options of a group from its caller", _group_options),
    Patch("group-names", "megatron.core.parallel_state.create_group", ALL_DEVICES, "0.16.1",
          "an error of the library that connects the ranks of a group does not say which group it was",
          "the core names the group in the error", _group_names),
    Patch("linear", "megatron.core.tensor_parallel.layers.linear_with_grad_accumulation_and_async_allreduce, "
          "linear_with_frozen_weight", ("cpu",), "0.16.1",
          "it names torch's product, which is not the fastest on every CPU; the core builds the head and "
          "takes no class of ours for it", "the core takes the function from its configuration", _linear),
    Patch("embedding", "megatron.core.tensor_parallel.layers.F", ("cpu", "cuda"), "0.16.1",
          "the gradient of the embedding is a whole table of zeros for a few rows, made and added every microbatch",
          "the core adds rows to the main gradient", _embedding),
    Patch("clipping", "megatron.core.optimizer.clip_grads.l2_norm_impl, multi_tensor_scale_impl", ALL_DEVICES, "0.16.1",
          "without Apex or TE every gradient is copied to be scaled, and the norm waits for the device at every tensor",
          "the core's own fallbacks work in place and on all tensors at once", _clipping),
)


def apply_patches(device: Device) -> list[str]:
    """Apply the ledger's records for `device`; returns their names. megatron.core must not be in use yet."""
    applied = [patch for patch in LEDGER if device.name in patch.devices]
    for patch in applied:
        patch.apply(device)
    return [patch.name for patch in applied]
