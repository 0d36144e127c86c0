"""How a model's layers are dealt to pipeline stages and virtual stages, and which layouts a model allows."""

from dataclasses import dataclass

from modellink.config.model import ModelConfig


@dataclass(frozen=True)
class Layout:
    """A tensor x pipeline layout; `chunks` is the number of virtual stages (model chunks) per pipeline rank."""

    tensor: int = 1
    pipeline: int = 1
    chunks: int = 1

    def layers_per_chunk(self, num_layers: int) -> int:
        return num_layers // (self.pipeline * self.chunks)

    def layer_indices(self, num_layers: int, stage: int, chunk: int = 0) -> range:
        """The global layers of one model chunk.

        Megatron deals layers round by round: chunk c of stage p holds k layers from c x PP x k + p x k on.
        """
        size = self.layers_per_chunk(num_layers)
        start = chunk * self.pipeline * size + stage * size
        return range(start, start + size)

    def is_first(self, stage: int, chunk: int = 0) -> bool:
        """Whether this chunk holds the embedding."""
        return stage == 0 and chunk == 0

    def is_last(self, stage: int, chunk: int = 0) -> bool:
        """Whether this chunk holds the final norm and the output layer."""
        return stage == self.pipeline - 1 and chunk == self.chunks - 1

    def check(self, model: ModelConfig) -> list[str]:
        """Every reason why `model` cannot be cut this way, one sentence each."""
        problems = []
        for what, size in (("num_attention_heads", model.num_attention_heads),
                           ("num_query_groups", model.num_query_groups),
                           ("ffn_hidden_size", model.ffn_hidden_size)):
            if size % self.tensor:
                fits = [str(n) for n in range(1, 65) if not any(
                    whole % n for whole in (model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size))]
                problems.append(f"{what} {size} is not divisible by tensor parallel size {self.tensor}; "
                                f"choose one of {', '.join(fits)}.")
        if self.chunks > 1 and self.pipeline == 1:
            problems.append(f"{self.chunks} virtual stages need a pipeline parallel size of 2 or more, but it is 1; "
                            "raise it or leave out --num-layers-per-virtual-pipeline-stage.")
        stages = self.pipeline * self.chunks
        if model.num_layers % stages:
            virtual = f" x {self.chunks} virtual stages" if self.chunks > 1 else ""
            fits = [str(n) for n in range(1, model.num_layers + 1) if model.num_layers % n == 0]
            problems.append(f"num_layers {model.num_layers} is not divisible by pipeline parallel size "
                            f"{self.pipeline}{virtual} = {stages}; the product must be one of {', '.join(fits)}.")
        return problems

    def __str__(self) -> str:
        virtual = f" VPP{self.chunks}" if self.chunks > 1 else ""
        return f"TP{self.tensor} PP{self.pipeline}{virtual}"
