"""One metrics line a step, the same numbers in metrics.jsonl and TensorBoard."""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modellink.config.model import ModelConfig
from modellink.device.base import Device
from modellink.device.specs import find_spec
from modellink.models.run import Run


def flops_per_token(model: ModelConfig, seq_length: int, *, frozen: bool = False) -> float:
    """FLOPs of forward and backward for one token: 6 a weight of a matrix product, attention counted causally.

    A frozen weight has no gradient of its own: 4 instead of 6. Adapters themselves are not counted (below 1 %).

    A token attends to half of the sequence on average: 2 products x 2 FLOPs x s/2 positions x hidden size a layer,
    three times (forward once, backward twice). The embedding look-up multiplies nothing; the head does.
    """
    kv_size = model.num_query_groups * model.head_dim
    layer = 2 * model.hidden_size**2 + 2 * model.hidden_size * kv_size + 3 * model.hidden_size * model.ffn_hidden_size
    matrices = model.num_layers * layer + model.vocab_size * model.hidden_size
    return (4.0 if frozen else 6.0) * matrices + 6.0 * model.num_layers * seq_length * model.hidden_size


def human_time(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Metrics:
    """Prints and stores the numbers of every step; only rank 0 makes one."""

    def __init__(self, run: Run, device: Device):
        settings = run.settings
        self.run = run
        self.device = device
        self.flops_per_token = flops_per_token(run.model, run.seq_length, frozen=run.lora is not None)
        spec = find_spec(device.product_name())
        self.peak_flops = spec.bf16_flops if spec and settings.train.precision != "fp32" else None
        save = Path(settings.checkpoint.save) if settings.checkpoint.save else None
        self.file = _open_lines(settings.logging.metrics_file or (save / "metrics.jsonl" if save else None))
        self.board = _open_board(settings.logging.tensorboard_dir or (save / "tensorboard" if save else None))
        if save:
            save.mkdir(parents=True, exist_ok=True)
            (save / "run.json").write_text(json.dumps(resolved(run), indent=2, default=str) + "\n", encoding="utf-8")
        self.first_step: int | None = None
        self.started = time.perf_counter()

    def step(self, values: Mapping[str, float], *, step: int, seconds: float) -> None:
        """Record one step.

        Args:
            values: loss, grad_norm, lr, loss_scale, tokens (real tokens of the step), samples, skipped.
            step: its number, from 1.
            seconds: its wall time.
        """
        now = time.perf_counter()
        if self.first_step is None:  # the first step pays for warm-up: leave it out of the estimate
            self.first_step, self.started = step, now
        total = self.run.settings.train.train_iters or step
        done = step - self.first_step
        average = (now - self.started) / done if done else seconds
        tokens = values["samples"] * self.run.seq_length / seconds / self.run.dims.world_size
        flops = tokens * self.flops_per_token
        record = {
            "step": step, **values,
            "seconds": seconds,
            "tokens_per_second_per_device": tokens,
            "tflops_per_device": flops / 1e12,
            "mfu": flops / self.peak_flops if self.peak_flops else None,
            "memory_gib": self.device.peak_memory() / 2**30,
            "eta_seconds": average * (total - step),
        }
        self._store("train", record)
        if step % self.run.settings.logging.log_interval == 0 or step == total:
            print(self._line(record, total), flush=True)

    def evaluation(self, split: str, loss: float, *, step: int) -> None:
        """Record the loss of an evaluation."""
        self._store(split, {"step": step, "loss": loss})
        print(f"{split} loss at step {step}: {loss:.6f}", flush=True)

    def _line(self, record: Mapping[str, Any], total: int) -> str:
        mfu = f"{100 * record['mfu']:.1f} %" if record["mfu"] is not None else "n/a"
        parts = [
            f"step {record['step']}/{total}", f"{100 * record['step'] / total:.1f} %",
            f"loss {record['loss']:.6f}", f"grad norm {record['grad_norm']:.4f}", f"lr {record['lr']:.3e}",
            f"loss scale {record['loss_scale']:g}",
            f"{record['tokens_per_second_per_device']:.0f} tokens/s/device",
            f"{record['tflops_per_device']:.3f} TFLOP/s/device", f"MFU {mfu}",
            f"memory {record['memory_gib']:.2f} GiB", f"ETA {human_time(record['eta_seconds'])}",
        ]
        if record["skipped"]:
            parts.append("skipped: gradients overflowed")
        return " | ".join(parts)

    def _store(self, kind: str, record: Mapping[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"kind": kind, **record}) + "\n")
            self.file.flush()
        if self.board is not None:
            for name, value in record.items():
                if name != "step" and value is not None:
                    self.board.add_scalar(f"{kind}/{name}", value, record["step"])

    def close(self) -> None:
        for sink in (self.file, self.board):
            if sink is not None:
                sink.close()


def resolved(run: Run) -> dict[str, Any]:
    """The resolved configuration: architecture with origins, layout, and every setting."""
    return {"model": run.model.as_dict(), "origins": run.origins, "layout": dataclasses.asdict(run.dims),
            "padded_vocab_size": run.padded_vocab_size, "seq_length": run.seq_length,
            "global_batch_size": run.global_batch_size, "settings": dataclasses.asdict(run.settings)}


def _open_lines(path: str | Path | None) -> Any:
    if path is None:
        return None
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return open(path, "a", encoding="utf-8")


def _open_board(folder: str | Path | None) -> Any:
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # TensorBoard is a development extra
        return None
    return SummaryWriter(str(folder))
