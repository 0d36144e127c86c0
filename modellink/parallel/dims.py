"""The product of parallel degrees, which checks itself."""

from dataclasses import dataclass

from modellink.config import ConfigError


@dataclass(frozen=True)
class ParallelDims:
    """How the ranks of a job are arranged: world_size = tensor x pipeline x data.

    Attributes:
        tensor: tensor parallel ranks.
        pipeline: pipeline stages.
        chunks: model chunks on each pipeline stage (1 = not interleaved).
        data: data parallel replicas.
        stage_layers: layers of each pipeline stage where they differ; None when all have the same number.
        sequence_parallel: activations outside the tensor parallel linears are split along the sequence.
    """

    tensor: int = 1
    pipeline: int = 1
    chunks: int = 1
    data: int = 1
    sequence_parallel: bool = False
    stage_layers: tuple[int, ...] | None = None

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def chunk_layers(self, num_layers: int, stage: int) -> int:
        """Layers in each model chunk of a pipeline stage."""
        if self.stage_layers is not None:
            return self.stage_layers[stage] // self.chunks
        return num_layers // (self.pipeline * self.chunks)

    @classmethod
    def from_world_size(cls, world_size: int, *, tensor: int, pipeline: int, num_layers: int,
                        layers_per_chunk: int | None, sequence_parallel: bool,
                        stage_layers: tuple[int, ...] | None = None) -> "ParallelDims":
        """Derive the data parallel degree and the number of chunks; `stage_layers` is already checked.

        Raises:
            ConfigError: every broken divisibility, one sentence each.
        """
        problems = []
        for name, degree in (("--tensor-model-parallel-size", tensor), ("--pipeline-model-parallel-size", pipeline)):
            if degree < 1:
                problems.append(f"{name} {degree}: must be at least 1.")
        if problems:
            raise ConfigError(problems)
        if world_size % (tensor * pipeline):
            problems.append(f"world size {world_size} is not divisible by tensor {tensor} x pipeline {pipeline} = "
                            f"{tensor * pipeline}: start a multiple of {tensor * pipeline} ranks or lower "
                            "--tensor-model-parallel-size or --pipeline-model-parallel-size.")
        if stage_layers is not None and len(set(stage_layers)) == 1:
            stage_layers = None
        if stage_layers is not None and layers_per_chunk is not None:
            problems.append(f"--num-layers-per-virtual-pipeline-stage {layers_per_chunk}: interleaving needs the same "
                            "number of layers in every stage; leave it out, or the flags of uneven stages.")
        if num_layers % pipeline and stage_layers is None:
            problems.append(f"{num_layers} layers are not divisible by --pipeline-model-parallel-size {pipeline}: "
                            "every stage needs the same number of layers; choose a divisor or give --num-layer-list.")
        chunks = 1
        if layers_per_chunk is not None and num_layers % pipeline == 0:
            per_stage = num_layers // pipeline
            if layers_per_chunk < 1 or per_stage % layers_per_chunk:
                problems.append(f"--num-layers-per-virtual-pipeline-stage {layers_per_chunk}: must divide the "
                                f"{per_stage} layers of a stage ({num_layers} layers / {pipeline} stages).")
            else:
                chunks = per_stage // layers_per_chunk
        if layers_per_chunk is not None and pipeline == 1:
            problems.append(f"--num-layers-per-virtual-pipeline-stage {layers_per_chunk}: interleaving needs "
                            "--pipeline-model-parallel-size of at least 2; leave the flag out.")
        if problems:
            raise ConfigError(problems)
        return cls(tensor=tensor, pipeline=pipeline, chunks=chunks, data=world_size // (tensor * pipeline),
                   sequence_parallel=sequence_parallel and tensor > 1, stage_layers=stage_layers)
