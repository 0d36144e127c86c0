"""Gradient buffers, optimizer and learning-rate schedule of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

from modellink.models.run import Run
from modellink.ops.embedding import embedding, leave_gradient_to_head
from modellink.ops.forms import DTYPES
from modellink.ops.parallel_linear import accumulates_weight_gradients
from modellink.training.batches import BatchSizes


def wrap_chunks(run: Run, config: Any, chunks: list[Any]) -> list[DistributedDataParallel]:
    """Give every chunk its fp32 gradient buffer and its reduction over data parallel ranks."""
    parallel = run.settings.parallel
    wrapped = [
        DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=parallel.overlap_grad_reduce,
                overlap_param_gather=parallel.overlap_param_gather,
                use_distributed_optimizer=parallel.use_distributed_optimizer,
            ),
            chunk,
            disable_bucketing=index > 0,  # only the first chunk's communication is on the critical path
        )
        for index, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        _accumulate_weight_gradients(chunk)
    single = len(wrapped) == 1
    config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        config.no_sync_func = wrapped[0].no_sync if single else [chunk.no_sync for chunk in wrapped]
        config.grad_sync_func = wrapped[0].start_grad_sync if single else [chunk.start_grad_sync for chunk in wrapped]
    if parallel.overlap_param_gather:
        config.param_sync_func = wrapped[0].start_param_sync if single else [c.start_param_sync for c in wrapped]
    return wrapped


def _accumulate_weight_gradients(chunk: DistributedDataParallel) -> None:
    """Let linear layers add to the main gradients that they have from now on, where an operation of ours does it."""
    if accumulates_weight_gradients(next(chunk.parameters()).device.type):
        for module in chunk.modules():
            if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                module.gradient_accumulation_fusion = True
            # deterministic look-ups, and those of other devices, have a gradient that is added to the head's
            elif (isinstance(module, VocabParallelEmbedding) and layers.F.embedding is embedding
                  and not module.deterministic_mode):
                leave_gradient_to_head(module.weight)


def build_optimizer(run: Run, config: Any, chunks: list[DistributedDataParallel]) -> Any:
    """megatron-core's optimizer: AdamW with no decay of biases and norms, fp32 main weights, clipping, loss scale."""
    train, options, parallel = run.settings.train, run.settings.optimizer, run.settings.parallel
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=options.lr,
            min_lr=options.min_lr,
            weight_decay=options.weight_decay,
            adam_beta1=options.adam_beta1,
            adam_beta2=options.adam_beta2,
            adam_eps=options.adam_eps,
            clip_grad=options.clip_grad,
            bf16=train.precision == "bf16",
            fp16=train.precision == "fp16",
            params_dtype=DTYPES[train.precision],
            loss_scale=train.loss_scale,
            initial_loss_scale=train.initial_loss_scale,
            min_loss_scale=train.min_loss_scale,
            loss_scale_window=train.loss_scale_window,
            hysteresis=train.hysteresis,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_param_gather=parallel.overlap_param_gather,
        ),
        chunks,
    )
    config.grad_scale_func = optimizer.scale_loss
    return optimizer


def build_schedule(run: Run, optimizer: Any) -> OptimizerParamScheduler:
    """Warm-up and decay, counted in samples as Megatron-LM does, so that a batch ramp-up stretches them rightly."""
    options, train = run.settings.optimizer, run.settings.train
    sizes = BatchSizes(run)
    decay = sizes.consumed_after(options.lr_decay_iters or train.train_iters or 0)
    warmup: float = sizes.consumed_after(options.lr_warmup_iters)
    if options.lr_warmup_fraction is not None:
        warmup = options.lr_warmup_fraction * decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=options.lr_warmup_init,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=sizes.consumed_after(train.train_iters or 0),
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=not options.override_opt_param_scheduler,
        override_opt_param_scheduler=options.override_opt_param_scheduler,
    )


def learning_rate(optimizer: Any) -> float:
    """The rate of the next step."""
    return next(group["lr"] for group in optimizer.param_groups)


@contextmanager
def complete_parameters(chunks: list[DistributedDataParallel]) -> Iterator[None]:
    """Inside the block every parameter holds its newest value, and forward passes gather nothing.

    With `--overlap-param-gather` the gather of a step happens inside the next forward pass.
    """
    overlapped = [chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook()
    yield
    for chunk in overlapped:
        chunk.enable_forward_pre_hook()


def grad_norm_value(norm: Any) -> float:
    return float(norm.item() if isinstance(norm, torch.Tensor) else norm or 0.0)
