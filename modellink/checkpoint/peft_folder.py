"""Reads PEFT's adapter folders: `adapter_config.json` beside `adapter_model.safetensors` (or `.bin`)."""

from pathlib import Path

import torch
from torch import Tensor

from modellink.checkpoint.adapter_config import ADAPTER_CONFIG, AdapterConfig, shape_of
from modellink.checkpoint.adapter_rules import adapter_chunk_rules
from modellink.checkpoint.adapters import Adapters
from modellink.checkpoint.hf_files import PickledFile, SafetensorsFile, WeightFile
from modellink.checkpoint.layout import Layout
from modellink.checkpoint.qwen15 import EMBEDDING, HEAD
from modellink.checkpoint.shapes import compare_shapes
from modellink.config.errors import ConfigError
from modellink.config.files import read_json
from modellink.config.model import ModelConfig
from modellink.lora.peft import PEFT_PREFIX, plan_of_peft
from modellink.lora.plan import LoraPlan

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
BASE_CHECKSUM = "modellink_base_checksum"  # in the metadata of the safetensors files that we write


class PeftContents:
    """What a PEFT folder says without knowing its base.

    Attributes:
        path: the file of weights.
        file: it, opened.
        names: for each tensor, under its name as a `Source`, its name in the file.
        checksum: of the base, where this program wrote the folder; else empty.
    """

    def __init__(self, folder: Path):
        self.config_path = Path(folder) / ADAPTER_CONFIG
        self.content = read_json(self.config_path)
        self.path, self.file = _open_weights(Path(folder))
        plain = {name: name.removeprefix(PEFT_PREFIX) for name in self.file.tensors}
        self.names = {short if short in (EMBEDDING, HEAD) else name: name for name, short in plain.items()}
        self.checksum: str = getattr(self.file, "metadata", {}).get(BASE_CHECKSUM, "")

    def tensor(self, name: str) -> Tensor:
        return self.file.get_tensor(self.names[name])

    def plan(self) -> LoraPlan:
        """See `plan_of_peft`."""
        tables = tuple(table for name, table in ((EMBEDDING, "word_embeddings"), (HEAD, "output_layer"))
                       if name in self.names)
        return plan_of_peft(self.content, self.names, tables, str(self.config_path))


def _open_weights(folder: Path) -> tuple[Path, WeightFile]:
    for name in (WEIGHTS, PICKLED):
        path = folder / name
        if path.exists():
            return path, PickledFile(path) if name == PICKLED else SafetensorsFile(path)
    raise ConfigError(f"{folder}: holds a PEFT {ADAPTER_CONFIG}, but neither {WEIGHTS} nor {PICKLED}; fetch the "
                      "adapters.")


class PeftFolder(Adapters):
    """An opened PEFT folder; tensors are views of the mapped file.

    Args:
        folder: it.
        model: the base's architecture, which a PEFT folder does not say.
    """

    def __init__(self, folder: Path, model: ModelConfig):
        self.folder, self.model = Path(folder), model
        self._contents = PeftContents(self.folder)
        if model.tie_word_embeddings and HEAD in self._contents.names:
            self._drop_tied_head()
        plan = self._contents.plan()
        self.config = AdapterConfig(plan, shape_of(model), self._contents.checksum)
        wanted = {tensor.name: tensor.shape for _, rule in adapter_chunk_rules(plan, model, Layout(), 0, 0)
                  for tensor in rule.hf}
        compare_shapes(str(self._contents.path), wanted, {name: self._contents.file.tensors[stored].shape
                                                          for name, stored in self._contents.names.items()})
        self.dtype = self.dtype_of(next(iter(wanted)))

    def _drop_tied_head(self) -> None:
        """PEFT may store the embedding a second time as the head of a tied model."""
        contents = self._contents
        if EMBEDDING not in contents.names or not torch.equal(contents.tensor(HEAD), contents.tensor(EMBEDDING)):
            raise ConfigError(f"{contents.path}: trains {HEAD} apart from the embedding, but the base's head is tied "
                              "to it; train adapters with embed_tokens in modules_to_save instead.")
        del contents.names[HEAD]

    def check(self) -> None:
        """Opening has compared every tensor."""

    def dtype_of(self, name: str) -> torch.dtype:
        return self._contents.file.tensors[self._contents.names[name]].dtype

    def read(self, name: str, dim: int, start: int, stop: int) -> list[Tensor]:
        return [self._contents.tensor(name).narrow(dim, start, stop - start)]
