"""How a model's layers are dealt to pipeline stages and virtual stages, and which layouts a model allows."""

from dataclasses import dataclass

from modellink.config.errors import ConfigError
from modellink.config.model import ModelConfig


@dataclass(frozen=True)
class Layout:
    """A tensor x pipeline layout.

    Attributes:
        tensor: tensor parallel size.
        pipeline: pipeline stages.
        chunks: virtual stages (model chunks) of each pipeline stage.
        stage_layers: layers of each stage where they differ; None when all stages have the same number.
    """

    tensor: int = 1
    pipeline: int = 1
    chunks: int = 1
    stage_layers: tuple[int, ...] | None = None

    @classmethod
    def of_stages(cls, tensor: int, stage_layers: tuple[int, ...], chunks: int = 1) -> "Layout":
        """The layout whose stages have these numbers of layers."""
        even = len(set(stage_layers)) == 1
        return cls(tensor, len(stage_layers), chunks, None if even else stage_layers)

    def layers_per_chunk(self, num_layers: int, stage: int = 0) -> int:
        """Layers in each chunk of a stage."""
        if self.stage_layers is not None:
            return self.stage_layers[stage] // self.chunks
        return num_layers // (self.pipeline * self.chunks)

    def layer_indices(self, num_layers: int, stage: int, chunk: int = 0) -> range:
        """The global layers of one model chunk.

        Megatron deals layers round by round: chunk c of stage p holds k layers from c x PP x k + p x k on. With uneven
        stages each has its own k, and a round is as long as the chunks of all stages together.
        """
        sizes = [self.layers_per_chunk(num_layers, other) for other in range(self.pipeline)]
        start = chunk * sum(sizes) + sum(sizes[:stage])
        return range(start, start + sizes[stage])

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
        if self.stage_layers is not None:
            return problems + self._uneven_problems(model.num_layers)
        stages = self.pipeline * self.chunks
        if model.num_layers % stages:
            virtual = f" x {self.chunks} virtual stages" if self.chunks > 1 else ""
            fits = [str(n) for n in range(1, model.num_layers + 1) if model.num_layers % n == 0]
            problems.append(f"num_layers {model.num_layers} is not divisible by pipeline parallel size "
                            f"{self.pipeline}{virtual} = {stages}; the product must be one of {', '.join(fits)}.")
        return problems

    def _uneven_problems(self, num_layers: int) -> list[str]:
        layers = self.stage_layers or ()
        told = ",".join(map(str, layers))
        if len(layers) != self.pipeline:
            return [f"layers of the stages {told}: {len(layers)} numbers for pipeline parallel size {self.pipeline}; "
                    "give one for each stage."]
        if min(layers) < 1 or sum(layers) != num_layers:
            return [f"layers of the stages {told}: each must be 1 or more and their sum {sum(layers)} must be "
                    f"num_layers {num_layers}; correct them."]
        if any(size % self.chunks for size in layers):
            return [f"layers of the stages {told}: not each is divisible by {self.chunks} virtual stages; change one."]
        return []

    def __str__(self) -> str:
        virtual = f" VPP{self.chunks}" if self.chunks > 1 else ""
        uneven = f" with {','.join(map(str, self.stage_layers))} layers" if self.stage_layers is not None else ""
        return f"TP{self.tensor} PP{self.pipeline}{virtual}{uneven}"


def stage_layers(num_layers: int, pipeline: int, *, layer_list: str | None = None, first: int | None = None,
                 last: int | None = None, prefix: str = "--") -> tuple[int, ...] | None:
    """The layers of every stage that the flags for uneven stages mean; None when none is given.

    Args:
        layer_list: numbers for all stages, `2,3,3`.
        first: layers of the first stage; the others share the rest evenly.
        last: layers of the last stage, likewise.
        prefix: what stands before the names of these values in messages: `--`, or nothing for saved args.

    Raises:
        ConfigError: the numbers cannot be dealt this way.
    """
    if layer_list is not None:
        name = f"{prefix}{'num-layer-list' if prefix else 'num_layer_list'} {layer_list}"
        if first is not None or last is not None:
            raise ConfigError(f"{name}: says the layers of every stage, so leave out the flags of the first and the "
                              "last stage.")
        words = layer_list.split(",")
        if not all(word.strip().isdecimal() for word in words):
            raise ConfigError(f"{name}: must be whole numbers with commas between, for example 2,3,3.")
        sizes = tuple(map(int, words))
        problems = Layout(1, pipeline, 1, sizes)._uneven_problems(num_layers)
        if problems:
            raise ConfigError(f"{name}: {problems[0].split(': ', 1)[1]}")
        return sizes
    if first is None and last is None:
        return None
    ends = [("first", first), ("last", last)]
    told = " ".join(f"{prefix}decoder-{end}-pipeline-num-layers {size}" for end, size in ends if size is not None)
    fixed = sum(size for _, size in ends if size is not None)
    others = pipeline - sum(size is not None for _, size in ends)
    if pipeline < 2:
        raise ConfigError(f"{told}: uneven stages need a pipeline parallel size of 2 or more; raise it or leave the "
                          "flag out.")
    rest = num_layers - fixed
    if min(size for _, size in ends if size is not None) < 1 or rest < others or (rest % others if others else rest):
        raise ConfigError(f"{told}: leaves {rest} of {num_layers} layers for {others} other stages, which must share "
                          "them evenly with 1 or more each; change it or give --num-layer-list.")
    middle = (rest // others,) * others if others else ()
    return (() if first is None else (first,)) + middle + (() if last is None else (last,))
