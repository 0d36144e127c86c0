"""What a program runs: settings merged with the model's architecture and the layout, checked."""

from dataclasses import dataclass, field

from modellink.config.model import ModelConfig
from modellink.config.settings import Settings
from modellink.lora.plan import LoraPlan
from modellink.parallel.communicators import groups_in_use
from modellink.parallel.dims import ParallelDims


@dataclass(frozen=True)
class Run:
    """One resolved run, made by `modellink.runtime.prepare_run`.

    Attributes:
        settings: the command line.
        model: the architecture.
        origins: for each field of `model`, where its value came from.
        dims: the parallel layout.
        padded_vocab_size: rows of the embedding table, a multiple of TP.
        seq_length: tokens of one sample.
        global_batch_size: samples of one step after ramp-up.
        notices: lines to print once at start (wishes that have no effect, what was chosen and why).
        lora: the adapters: of training, those trained, None when all weights are; of generation, those in use.
        device: name of the device it runs on, empty while another machine will choose it.
        trains: it trains; otherwise it generates or evaluates.
    """

    settings: Settings
    model: ModelConfig
    origins: dict[str, str]
    dims: ParallelDims
    padded_vocab_size: int
    seq_length: int
    global_batch_size: int
    notices: tuple[str, ...] = field(default=())
    lora: LoraPlan | None = None
    device: str = ""
    trains: bool = True

    def groups(self, stage: int) -> list[str]:
        """Process groups that run a collective on a rank of a pipeline stage, by the names of `device/buffers.py`."""
        return groups_in_use(self.dims, stage, is_tied=self.model.tie_word_embeddings, trains=self.trains,
                             is_sharded=self.settings.parallel.use_distributed_optimizer)
