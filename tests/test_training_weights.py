"""Training straight from a HF folder, uneven pipeline stages, and HF exports while training."""

import json
from pathlib import Path

import pytest
import torch
from ladder import read_metrics, run_cases
from safetensors.torch import load_file
from tiny import TINY, save_tiny
from transformers import Qwen2ForCausalLM

from modellink.checkpoint.checksums import check_files
from modellink.checkpoint.convert import main as convert
from modellink.checkpoint.megatron import open_megatron
from modellink.config.errors import ConfigError
from modellink.config.settings import parse_settings
from modellink.data.mock import MockDataset
from modellink.runtime import prepare_run

TIED = ("one", "first")  # layouts of the tied model: with and without a copy of the embedding as head
COMMON = ["--mock-data", "--train-iters", "3", "--eval-iters", "0", "--seq-length", "32", "--micro-batch-size", "1",
          "--global-batch-size", "8", "--lr", "1e-3", "--device", "cpu", "--seed", "5"]
LAYOUTS = {  # name: (ranks, flags)
    "one": (1, []),
    "tp2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "uneven": (2, ["--pipeline-model-parallel-size", "2", "--num-layer-list", "1,3"]),
    "first": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2",
                  "--decoder-first-pipeline-num-layers", "3"]),
    "vpp": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2",
                "--num-layers-per-virtual-pipeline-stage", "1"]),
    "dp": (4, ["--pipeline-model-parallel-size", "2", "--decoder-last-pipeline-num-layers", "1",
               "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]),
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A HF folder, and a run from it in every layout with a checkpoint and HF exports."""
    folder = tmp_path_factory.mktemp("weights")
    save_tiny(folder / "hf", tie_word_embeddings=request.param)
    names = TIED if request.param else tuple(LAYOUTS)
    for ranks in (1, 2, 4):
        cases = [[*COMMON, *flags, "--load", str(folder / "hf"), "--save", str(folder / name), "--save-hf",
                  str(folder / f"{name}-hf"), "--save-hf-interval", "2"]
                 for name, (count, flags) in LAYOUTS.items() if count == ranks and name in names]
        if cases:
            run_cases(cases, ranks, folder)
    return folder


def layouts_of(base: Path) -> list[str]:
    return [name for name in LAYOUTS if (base / name).is_dir()]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl")]


def test_every_layout_starts_from_the_hf_folder(base: Path) -> None:
    model = Qwen2ForCausalLM.from_pretrained(base / "hf", dtype=torch.float32)
    data = MockDataset(TINY["vocab_size"], 32, 8, 5)
    samples = [data[index] for index in range(8)]
    ids, labels = (torch.stack([torch.as_tensor(sample[key]) for sample in samples]) for key in ("tokens", "labels"))
    with torch.no_grad():
        first = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten()).item()
    reference = losses(base / "one")
    assert len(reference) == 3 and abs(reference[0] - first) < 2e-5
    for name in layouts_of(base):
        assert losses(base / name) == pytest.approx(reference, abs=1e-4), name


def test_exports_are_the_checkpoint_exported(base: Path, tmp_path: Path) -> None:
    assert len(layouts_of(base)) >= 2
    for name in layouts_of(base):
        check_export(base, name, tmp_path / name)


def check_export(base: Path, name: str, out: Path) -> None:
    saved = open_megatron(base / name)
    assert saved.iteration == 3
    assert sorted(path.name for path in (base / f"{name}-hf").iterdir()) == ["iter_0000002", "iter_0000003"]
    assert convert(["--from", "megatron", "--to", "hf", "--load-dir", str(base / name), "--save-dir",
                    str(out), "--verify"]) == 0
    ours, theirs = (load_file(folder / "model.safetensors")
                    for folder in (base / f"{name}-hf" / "iter_0000003", out))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key
    earlier = load_file(base / f"{name}-hf" / "iter_0000002" / "model.safetensors")
    assert not torch.equal(earlier["model.norm.weight"], ours["model.norm.weight"])
    check_files(base / f"{name}-hf" / "iter_0000003")
    config = json.loads((base / f"{name}-hf" / "iter_0000003" / "config.json").read_text())
    assert config["dtype"] == "float32" and config["vocab_size"] == TINY["vocab_size"]
    Qwen2ForCausalLM.from_pretrained(base / f"{name}-hf" / "iter_0000003")


def test_uneven_checkpoints_say_so_and_resume(base: Path) -> None:
    if "uneven" not in layouts_of(base):
        assert open_megatron(base / "first").layout.stage_layers == (3, 1)
        return
    assert open_megatron(base / "uneven").layout.stage_layers == (1, 3)
    assert open_megatron(base / "first").layout.stage_layers == (3, 1)
    assert open_megatron(base / "dp").layout.stage_layers == (3, 1)
    more = [*COMMON, "--train-iters", "5", "--override-opt-param-scheduler"]
    run_cases([[*more, "--load", str(base / "one"), "--metrics-file", str(base / "one5.jsonl")]], 1, base)
    run_cases([[*more, *LAYOUTS["uneven"][1], "--load", str(base / "uneven"), "--metrics-file",
                str(base / "uneven5.jsonl")]], 2, base)
    ours, reference = ([record["loss"] for record in read_metrics(base / f"{name}5.jsonl")]
                       for name in ("uneven", "one"))
    assert len(ours) == 2 and ours == pytest.approx(reference, abs=1e-4)


def test_the_optimizer_of_uneven_stages_needs_the_same_stages(base: Path) -> None:
    words = [*COMMON, "--load", str(base / "first"), "--pipeline-model-parallel-size", "2",
             "--tensor-model-parallel-size", "2"]
    with pytest.raises(ConfigError, match="optimizer state is of layout TP2 PP2 with 1 model chunk a stage and 3,1"):
        prepare_run(parse_settings("x", "", words), 4, "train")
    prepare_run(parse_settings("x", "", [*words, "--num-layer-list", "3,1"]), 4, "train")
    prepare_run(parse_settings("x", "", [*words, "--finetune"]), 4, "train")


@pytest.mark.parametrize("words, message", [
    (["--num-layer-list", "1,2", "--pipeline-model-parallel-size", "2"], "their sum 3 must be num_layers 4"),
    (["--decoder-first-pipeline-num-layers", "1"], "need a pipeline parallel size of 2"),
    (["--num-layer-list", "1,3", "--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage",
      "1"], "interleaving needs the same number of layers"),
    (["--save-hf-interval", "3"], "--save-hf-interval 3 without --save-hf"),
    (["--save-hf", "out", "--lora-target-modules", "dense"], "--save-hf out with --lora-target-modules"),
])
def test_wrong_flags(tmp_path: Path, words: list[str], message: str) -> None:
    save_tiny(tmp_path / "hf")
    with pytest.raises(ConfigError, match=message):
        prepare_run(parse_settings("x", "", [*COMMON, "--load", str(tmp_path / "hf"), *words]), 2, "train")
