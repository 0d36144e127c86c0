"""The plan of a training run: a table for the reader, and checks of memory and disk."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from modellink.config.errors import ProblemList
from modellink.device.buffers import buffer_line
from modellink.models.run import Run
from modellink.planner.memory import StagePlan, stage_plan

GIB = 1024**3
# a process before it holds any weight: the largest resident set after importing torch 2.13 and megatron-core's GPTModel
PROCESS_BYTES = 360 * 1024**2


@dataclass(frozen=True)
class Place:
    """The machine whose memory and disk are checked.

    Attributes:
        device: name of its device.
        free_bytes: free memory of one accelerator, or of the whole host on cpu.
        shared: the ranks of a node share `free_bytes` (cpu).
    """

    device: str
    free_bytes: int
    shared: bool


@dataclass(frozen=True)
class Plan:
    """What every rank of a run will hold."""

    run: Run
    stages: tuple[StagePlan, ...]

    @classmethod
    def of(cls, run: Run) -> "Plan":
        return cls(run, tuple(stage_plan(run, stage) for stage in range(run.dims.pipeline)))

    def stage_of_rank(self, rank: int) -> StagePlan:
        """Megatron-core numbers ranks tensor first, then data, then pipeline."""
        return self.stages[rank // (self.run.dims.tensor * self.run.dims.data)]

    def ranks_of_stage(self, stage: int) -> range:
        size = self.run.dims.tensor * self.run.dims.data
        return range(stage * size, (stage + 1) * size)

    def checkpoint_bytes(self, ranks: range) -> int:
        """Bytes that these ranks write for one checkpoint."""
        settings, dims = self.run.settings, self.run.dims
        sharded = settings.parallel.use_distributed_optimizer
        total = 0
        for rank in ranks:
            stage = self.stage_of_rank(rank)
            first_replica = (rank // dims.tensor) % dims.data == 0
            if first_replica:
                # a LoRA run saves what it trains
                total += stage.weights * stage.trained // stage.parameters
            if settings.checkpoint.save_optim and (sharded or first_replica):
                total += stage.optimizer
        return total

    def lines(self) -> list[str]:
        """The plan as text."""
        run, dims = self.run, self.run.dims
        chunk_text = f" x {dims.chunks} chunks" if dims.chunks > 1 else ""
        microbatches = run.global_batch_size // (run.settings.train.micro_batch_size * dims.data)
        lines = [
            f"model       {run.model.num_parameters:,} parameters, {run.model.num_layers} layers x "
            f"{run.model.hidden_size}, vocabulary {run.model.vocab_size} rows padded to {run.padded_vocab_size} "
            f"({run.origins['num_layers']})",
            *self._lora_lines(),
            f"ranks       {dims.world_size} = tensor {dims.tensor}"
            f"{' with sequence parallel' * dims.sequence_parallel} x pipeline {dims.pipeline}{chunk_text} "
            f"x data {dims.data}",
            f"batch       {run.global_batch_size} samples of {run.seq_length} tokens, {microbatches} microbatches of "
            f"{run.settings.train.micro_batch_size}, {run.settings.train.precision}",
            "",
            f"{'stage':>5}  {'ranks':>9}  {'layers':<24}{'parameters':>15}{'weights':>9}{'grads':>9}{'optim':>9}"
            f"{'activ.':>9}{'total':>9}   per rank, GiB",
        ]
        for stage in self.stages:
            ranks = self.ranks_of_stage(stage.stage)
            sizes = (stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.total)
            columns = "".join(f"{size / GIB:9.2f}" for size in sizes)
            for index, chunk in enumerate(stage.chunks):
                extra = " +embedding" * chunk.has_embedding + " +head" * chunk.has_head
                name = f"{chunk.layers.start}-{chunk.layers.stop - 1}{extra}"
                start = (f"{stage.stage:>5}  {f'{ranks.start}-{ranks.stop - 1}':>9}  " if index == 0 else " " * 18)
                lines.append(f"{start}{name:<24}{chunk.parameters:>15,}{columns if index == 0 else ''}")
            if len(stage.chunks) > 1:
                lines.append(f"{'':18}{'all chunks':<24}{stage.parameters:>15,}")
        lines.append(f"largest     {max(stage.total for stage in self.stages):,} bytes a rank "
                     "(activations are an estimate; the framework's own memory comes on top)")
        reference = max(stage.reference for stage in self.stages)
        if reference:
            lines.append(f"reference   a second, frozen model takes up to {reference:,} bytes of a rank's total")
        communicators = max((stage.communicators for stage in self.stages), key=lambda sizes: sum(sizes.values()))
        if communicators:
            lines.append(buffer_line(communicators))
        if run.settings.checkpoint.save is not None:
            lines.append(f"checkpoint  {self.checkpoint_bytes(range(dims.world_size)):,} bytes over all ranks")
        return lines

    def _lora_lines(self) -> list[str]:
        lora = self.run.lora
        if lora is None:
            return []
        trained = sum(stage.trained for stage in self.stages)
        more = "".join(f", {word}" for word, on in (("rsLoRA", lora.use_rslora), ("DoRA", lora.use_dora)) if on)
        whole = f", {' and '.join(lora.modules_to_save)} whole" if lora.modules_to_save else ""
        return [f"LoRA        {' '.join(lora.targets)}: rank {lora.rank}, alpha {lora.alpha:g}{more}{whole}; "
                f"{trained:,} parameters trained on one tensor parallel rank of each stage, the rest frozen"]

    def check_memory(self, place: Place, node_ranks: range, problems: ProblemList) -> None:
        """The ranks of this node must fit its memory."""
        needs = [self.stage_of_rank(rank).least for rank in node_ranks]
        if place.shared:
            need = sum(needs) + PROCESS_BYTES * len(needs)
            if need > place.free_bytes:
                problems.add(f"memory: {len(needs)} ranks on this host need at least {need / GIB:.1f} GiB together, "
                             f"but {place.free_bytes / GIB:.1f} GiB are free: use fewer ranks on this host, a shorter "
                             "--seq-length, or --recompute-granularity full.")
        elif max(needs) > place.free_bytes:
            problems.add(f"memory: a rank needs at least {max(needs) / GIB:.1f} GiB, but one {place.device} has "
                         f"{place.free_bytes / GIB:.1f} GiB free: use a higher --tensor-model-parallel-size or "
                         "--pipeline-model-parallel-size, a shorter --seq-length, or --recompute-granularity full.")

    def check_disk(self, node_ranks: range, problems: ProblemList) -> None:
        """The `--save` folder must have room for one checkpoint of this node's ranks."""
        save = self.run.settings.checkpoint.save
        if save is None:
            return
        folder = Path(save).absolute()
        while not folder.is_dir():
            folder = folder.parent
        need, free = self.checkpoint_bytes(node_ranks), shutil.disk_usage(folder).free
        if need > free:
            problems.add(f"--save {save}: a checkpoint of this node's ranks needs {need / GIB:.1f} GiB, but the disk "
                         f"has {free / GIB:.1f} GiB free: free space, choose another folder or use --no-save-optim.")
