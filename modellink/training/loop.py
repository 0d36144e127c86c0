"""The training loop."""

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from modellink.checkpoint.sources import holds_weights
from modellink.device.base import Device
from modellink.device.report import device_lines, package_lines
from modellink.device.specs import peak_line
from modellink.models import forms
from modellink.models.build import build_chunks, transformer_config
from modellink.models.compiled import compile_layers
from modellink.models.run import Run
from modellink.ops.table import describe
from modellink.training.adapters import start_adapters
from modellink.training.batches import BatchSizes, MicrobatchReader
from modellink.training.data import load_data
from modellink.training.faults import StopRequest
from modellink.training.hf_export import save_hf
from modellink.training.metrics import Metrics
from modellink.training.optimizer import (
    build_optimizer,
    build_schedule,
    complete_parameters,
    grad_norm_value,
    learning_rate,
    wrap_chunks,
)
from modellink.training.preference import preference_objective
from modellink.training.profiling import StepProfiler
from modellink.training.state import TrainState, load, save
from modellink.training.step import StepResult, reduce_reports, run_microbatches


def build_state(run: Run, device: Device) -> TrainState:
    """Model, optimizer and schedule of this rank with random weights."""
    config = transformer_config(run, device.name)
    forms.choose_forms(run, device)
    if run.settings.data.variable_seq_lengths:
        device.vary_lengths()
    chunks = build_chunks(run, config, device.name)
    if run.settings.device.compile == "layer":
        compile_layers(chunks, is_packed=run.settings.data.pack)
    wrapped = wrap_chunks(run, config, [chunk.to(device.current()) for chunk in chunks])
    for chunk in wrapped:
        chunk.train()
    optimizer = build_optimizer(run, config, wrapped)
    return TrainState(run, device, wrapped, optimizer, build_schedule(run, optimizer))


class Trainer:
    """Runs steps on a state."""

    def __init__(self, state: TrainState):
        self.state = state
        self.run = state.run
        self.sizes = BatchSizes(state.run)
        self.preference = preference_objective(state) if state.run.settings.data_kind == "pairs" else None
        self.means = ("reward_accuracy", "reward_margin") if self.preference else ()

    def reader(self, dataset: Any, *, evaluates: bool = False) -> MicrobatchReader:
        """A reader for `step`, or for `evaluate`, whose batches do not ramp up."""
        sizes = (lambda consumed: self.run.global_batch_size) if evaluates else self.sizes.at
        return MicrobatchReader(dataset, self.run, self.state.device.current(), sizes)

    def step(self, reader: MicrobatchReader, flags: list[int]) -> tuple[StepResult, dict[str, float]]:
        """One optimizer step.

        Args:
            reader: the training data.
            flags: numbers of this rank that are summed over all ranks on the way.

        Returns:
            The reduced result, and the numbers of the metrics line.
        """
        state, progress = self.state, self.state.progress
        batch_size = self.sizes.at(progress.consumed_train_samples)
        for chunk in state.chunks:
            chunk.zero_grad_buffer()
        state.optimizer.zero_grad()
        reports = self._microbatches(reader, progress.consumed_train_samples, batch_size, forward_only=False)
        done, norm, _ = state.optimizer.step()
        result = reduce_reports(reports, flags, state.device.current(), self.means)
        rate = learning_rate(state.optimizer)
        if done:
            state.schedule.step(increment=batch_size)
        progress.step += 1
        progress.consumed_train_samples += batch_size
        return result, {"loss": result.loss, "grad_norm": grad_norm_value(norm), "lr": rate,
                        "loss_scale": float(state.optimizer.get_loss_scale()), "tokens": result.tokens,
                        "samples": batch_size, "skipped": float(not done), **result.means}

    @torch.no_grad()
    def evaluate(self, reader: MicrobatchReader, consumed_samples: int, num_steps: int) -> float:
        """Mean loss over the real tokens of `num_steps` global batches."""
        batch_size = self.run.global_batch_size
        total = tokens = 0.0
        for chunk in self.state.chunks:
            chunk.eval()
        with complete_parameters(self.state.chunks):
            for index in range(num_steps):
                reports = self._microbatches(reader, consumed_samples + index * batch_size, batch_size,
                                             forward_only=True)
                result = reduce_reports(reports, [], self.state.device.current(), self.means)
                total += result.loss * result.tokens
                tokens += result.tokens
        for chunk in self.state.chunks:
            chunk.train()
        return total / tokens if tokens else 0.0

    def _microbatches(self, reader: MicrobatchReader, consumed: int, batch_size: int,
                      forward_only: bool) -> list[dict[str, torch.Tensor]]:
        count = self.sizes.microbatches(batch_size)
        make = partial(reader.step, consumed, len(self.state.chunks))
        if self.preference is not None:
            return self.preference.run(self.state.chunks, make, num_microbatches=count, forward_only=forward_only)
        return run_microbatches(self.state.chunks, make(), num_microbatches=count, forward_only=forward_only)


def train(run: Run, device: Device) -> None:
    """Train to `--train-iters`: load, step, evaluate, save."""
    settings = run.settings
    rank_zero = dist.get_rank() == 0
    stop = StopRequest()
    if rank_zero:
        print("\n".join([*package_lines(), *device_lines(device), *describe(forms.situation_of(run, device))]),
              flush=True)
    train_set, valid_set, test_set = load_data(run)
    state = build_state(run, device)
    line = None
    if run.lora is not None:
        line = start_adapters(state)
    elif settings.checkpoint.load is not None and holds_weights(Path(settings.checkpoint.load)):
        line = load(state, Path(settings.checkpoint.load))
    if line is not None and rank_zero:
        print(line, flush=True)
    metrics = Metrics(run, device) if rank_zero else None
    if rank_zero:
        print("TFLOP/s count attention causally; tokens/s count every position of a sample; "
              + peak_line(device.product_name(), settings.train.precision), flush=True)
    trainer = Trainer(state)
    profiler = StepProfiler(settings.profiling, device, dist.get_rank())
    reader = trainer.reader(train_set)
    valid_reader = trainer.reader(valid_set, evaluates=True) if valid_set is not None else None
    progress, options = state.progress, settings.train
    started, saved_at = time.monotonic(), -1
    total = options.train_iters or 0

    while progress.step < total:
        begin = time.perf_counter()
        minutes = (time.monotonic() - started) / 60
        late = options.exit_duration_in_mins is not None and minutes >= options.exit_duration_in_mins
        with profiler.step(progress.step + 1):
            result, values = trainer.step(reader, [int(stop.asked), int(late)])
        step = progress.step
        if metrics is not None:
            progress.flops += metrics.flops_per_token * values["samples"] * run.seq_length
            metrics.step(values, step=step, seconds=time.perf_counter() - begin)
        if not math.isfinite(result.loss) and settings.train.precision != "fp16":
            raise FloatingPointError(f"the loss of step {step} is {result.loss}; the last checkpoint is unharmed")
        if valid_reader is not None and options.eval_iters and step % options.eval_interval == 0:
            loss = trainer.evaluate(valid_reader, progress.consumed_valid_samples, options.eval_iters)
            progress.consumed_valid_samples += options.eval_iters * run.global_batch_size
            if metrics is not None:
                metrics.evaluation("validation", loss, step=step)
        reason = _exit_reason(result.flags, options.exit_interval, step)
        interval = settings.checkpoint.save_interval
        if settings.checkpoint.save and (reason or step == total or (interval and step % interval == 0)):
            save(state, Path(settings.checkpoint.save))
            saved_at = step
            if rank_zero:
                print(f"saved step {step} to {settings.checkpoint.save}", flush=True)
        _export(state, last=bool(reason) or step == total)
        if reason:
            if rank_zero:
                print(f"stopped after step {step}: {reason}"
                      + ("" if saved_at == step else "; nothing was saved, --save was not given"), flush=True)
            break
    else:
        if test_set is not None and options.eval_iters:
            loss = trainer.evaluate(trainer.reader(test_set, evaluates=True), 0, options.eval_iters)
            if metrics is not None:
                metrics.evaluation("test", loss, step=progress.step)
    profiler.close()
    if metrics is not None:
        metrics.close()


def _export(state: TrainState, *, last: bool) -> None:
    """`--save-hf` after the steps it is due."""
    options, step = state.run.settings.checkpoint, state.progress.step
    interval = options.save_hf_interval
    if options.save_hf is not None and (last or (interval is not None and step % interval == 0)):
        target = save_hf(state, Path(options.save_hf))
        if dist.get_rank() == 0:
            print(f"exported step {step} to {target}", flush=True)


def _exit_reason(flags: list[int], exit_interval: int | None, step: int) -> str | None:
    asked, late = flags
    if asked:
        return "SIGTERM"
    if late:
        return "--exit-duration-in-mins"
    if exit_interval and step % exit_interval == 0:
        return f"--exit-interval {exit_interval}"
    return None
