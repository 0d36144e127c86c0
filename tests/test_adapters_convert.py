"""Adapters through the converter without training: the original's checkpoints, PEFT's forms, and every wrong input."""

import argparse
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import SIZES, assert_same, load_hf, make_hf, packed_by_hand, tree
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from modellink.checkpoint.adapters import AdapterCheckpoint
from modellink.checkpoint.command import main as checkpoint_command
from modellink.checkpoint.convert import main
from modellink.checkpoint.peft_folder import PeftFolder
from modellink.config.errors import run_command
from modellink.config.model import ModelConfig

RANK, ALPHA = 4, 10.0
PROJECTIONS = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn", "gate": "mlp", "up": "mlp",
               "down": "mlp"}
# the original's name of a fused layer: megatron-core's place, the HF projections in it
ORIGINAL = {"self_attention.query_key_value": ("self_attention.linear_qkv", "qkv"),
            "self_attention.dense": ("self_attention.linear_proj", "o"),
            "mlp.dense_h_to_4h": ("mlp.linear_fc1", ("gate", "up")),
            "mlp.dense_4h_to_h": ("mlp.linear_fc2", ("down",))}
MODEL = ModelConfig(num_layers=4, hidden_size=24, ffn_hidden_size=40, num_attention_heads=6, num_query_groups=2,
                    vocab_size=101, rope_theta=5000000.0)


def run(text: str) -> int:
    return run_command(main, shlex.split(text))


def sides(state: dict[str, Tensor], seed: int = 5, shared: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random A and B under the HF names of the weights they sit on; `shared`: one A for each fused layer."""
    generator = torch.Generator().manual_seed(seed)
    a: dict[str, Tensor] = {}
    b: dict[str, Tensor] = {}
    for layer in range(SIZES["layers"]):
        for _, letters in ORIGINAL.values():
            first = None
            for letter in letters:
                name = f"model.layers.{layer}.{PROJECTIONS[letter]}.{letter}_proj.weight"
                rows, columns = state[name].shape
                drawn = torch.randn(RANK, columns, generator=generator)
                first = drawn if first is None or not shared else first
                a[name], b[name] = first, torch.randn(rows, RANK, generator=generator) / 8
    return a, b


def merged_by_hand(state: dict[str, Tensor], a: dict[str, Tensor], b: dict[str, Tensor],
                   scale: float = ALPHA / RANK) -> dict[str, Tensor]:
    return {name: weight + scale * b[name] @ a[name] if name in a else weight for name, weight in state.items()}


def save_original(folder: Path, state: dict[str, Tensor], a: dict[str, Tensor], b: dict[str, Tensor], *,
                  nested: bool = True, stages: int = 2, **args: Any) -> None:
    """A LoRA checkpoint as the original ModelLink saves it at TP2: adapters in the encoder, beside the tables."""
    for stage in range(stages):
        layers = list(range(4 * stage // stages, 4 * (stage + 1) // stages))
        for rank in range(2):
            columns, rows, base = (packed_by_hand({**state, **side}, layers, 2, rank, first=stage == 0, last=False,
                                                  padded=104, groups=2, head=None) for side in (b, a, {}))
            encoder: dict[str, Tensor] = {}
            for local, layer in enumerate(layers):
                for theirs, (ours, letters) in ORIGINAL.items():
                    place = f"layers.{local}.{theirs if nested else ours}."
                    name = f"model.layers.{layer}.{PROJECTIONS[letters[0]]}.{letters[0]}_proj.weight"
                    packed = f"decoder.layers.{local}.{ours}.weight"
                    is_row = letters[0] in ("o", "down")
                    encoder[f"{place}lora_A.default.weight"] = (rows[packed] if is_row else a[name]).clone()
                    encoder[f"{place}lora_B.default.weight"] = (b[name] if is_row else columns[packed]).clone()
            table = {"embedding.word_embeddings.weight": base.get("embedding.word_embeddings.weight")}
            model: dict[str, Any] = {f"decoder.{name}": value for name, value in encoder.items()}
            if stage == 0:
                model |= table
            if nested:
                model = {"language_model": {"encoder": encoder}}
                if stage == 0:
                    model["language_model"]["embedding"] = {"word_embeddings": {"weight": table.popitem()[1]}}
            values = {"num_layers": 4, "hidden_size": 24, "ffn_hidden_size": 40, "num_attention_heads": 6,
                      "group_query_attention": True, "num_query_groups": 2, "tensor_model_parallel_size": 2,
                      "pipeline_model_parallel_size": stages, "virtual_pipeline_model_parallel_size": None,
                      "padded_vocab_size": 104, **args}
            suffix = f"_{stage:03d}" if stages > 1 else ""
            path = folder / "iter_0000009" / f"mp_rank_{rank:02d}{suffix}" / "model_optim_rng.pt"
            path.parent.mkdir(parents=True)
            torch.save({"args": argparse.Namespace(**values), "checkpoint_version": 3.0, "iteration": 9,
                        "model": model}, path)
    (folder / "latest_checkpointed_iteration.txt").write_text("9")


def save_peft(folder: Path, a: dict[str, Tensor], b: dict[str, Tensor], **changes: Any) -> None:
    folder.mkdir()
    tensors = {f"base_model.model.{name.removesuffix('weight')}lora_{letter}.weight": tensor.contiguous()
               for letter, side in (("A", a), ("B", b)) for name, tensor in side.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none",
              "target_modules": ".*_proj", "rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in both forms, another one, and adapters of every form for it; all made by hand or by the converter."""
    root = tmp_path_factory.mktemp("convert")
    state = make_hf(root / "hf", torch.float32)
    make_hf(root / "other-hf", torch.float32, seed=1)
    make_hf(root / "wide-hf", torch.float32, ffn=48)
    save_peft(root / "peft", *sides(state))
    save_original(root / "original", state, *sides(state, shared=True), lora_alpha=ALPHA, lora_r=RANK)
    for command in (f"--from hf --load-dir {root}/hf --save-dir {root}/mg --target-pipeline-parallel-size 2",
                    f"--from adapters --to adapters --load-dir {root}/peft --base-dir {root}/mg --save-dir {root}/own "
                    "--target-tensor-parallel-size 2"):
        assert run(command) == 0
    return root


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folders of `place`, from a folder of the test's own."""
    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("stages", [1, 2])
def test_lora_checkpoints_of_the_original_are_merged(nested: bool, stages: int, here: Path) -> None:
    state = load_hf(here / "hf")
    a, b = sides(state, shared=True)
    save_original(here / "lora", state, a, b, nested=nested, stages=stages)  # its args do not say alpha
    assert run("--load-dir mg --lora-load lora --save-dir no") == 2
    assert run(f"--load-dir mg --lora-load lora --lora-alpha {ALPHA} --save-dir out --verify "
               "--target-tensor-parallel-size 2 --target-pipeline-parallel-size 4") == 0
    assert run("--to hf --load-dir out --save-dir back") == 0
    found, expected = load_hf(here / "back"), merged_by_hand(state, a, b)
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, atol=1e-5), name
        assert torch.equal(found[name], state[name]) == (name not in a)


def test_original_adapters_leave_in_both_forms(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--from adapters --to peft --load-dir original --base-dir hf --save-dir out-peft --verify") == 0
    assert run("--from adapters --to adapters --load-dir original --base-dir hf --save-dir out-own --verify "
               "--target-tensor-parallel-size 1 --target-pipeline-parallel-size 1") == 0
    a, b = sides(load_hf(here / "hf"), shared=True)
    tensors = load_file(here / "out-peft" / "adapter_model.safetensors")
    for name in a:
        owner = f"base_model.model.{name.removesuffix('.weight')}"
        assert torch.equal(tensors[f"{owner}.lora_A.weight"], a[name])
        assert torch.equal(tensors[f"{owner}.lora_B.weight"], b[name])
    own = AdapterCheckpoint(here / "out-own")
    assert own.config.plan.kind == "fused" and own.config.plan.alpha == ALPHA and own.iteration == 9
    assert own.config.base_checksum == AdapterCheckpoint(here / "own").config.base_checksum
    capsys.readouterr()
    assert checkpoint_command(["show", "original"]) == 0
    said = capsys.readouterr().out
    assert "of the original ModelLink" in said and "TP2 PP2" in said and "rank 4, alpha 10, scale 2.5" in said


@pytest.mark.parametrize("dtype, asked", [(torch.float32, ""), (torch.bfloat16, ""), (torch.bfloat16, "fp32")])
def test_the_sum_is_rounded_once_to_the_dtype_asked(dtype: torch.dtype, asked: str, here: Path) -> None:
    state = make_hf(here / "base", dtype)
    a, b = sides(state)
    target = torch.float32 if asked else dtype
    wide = {name: weight.float() for name, weight in state.items()}
    flag = f"--params-dtype {asked}" if asked else ""
    assert run(f"--from hf --to hf --load-dir base --lora-load peft --save-dir out {flag}") == 0
    exact = merged_by_hand(wide, a, b)
    for name, weight in load_hf(here / "out").items():
        assert weight.dtype is target
        # half a unit of the last place of the dtype, and of the fp32 sum
        bound = exact[name].abs() * torch.finfo(target).eps / 2 * 1.01 + 2e-6
        assert bool(((weight.float() - exact[name]).abs() <= bound).all()), name


def test_forms_of_peft_folders(here: Path) -> None:
    tensors = load_file(here / "peft" / "adapter_model.safetensors")
    expected = dict(PeftFolder(here / "peft", MODEL).tensors())
    assert_same(expected, tensors)
    shutil.copytree(here / "peft", here / "pickled")
    (here / "pickled" / "adapter_model.safetensors").unlink()
    torch.save(tensors, here / "pickled" / "adapter_model.bin")
    assert_same(dict(PeftFolder(here / "pickled", MODEL).tensors()), tensors)
    state = load_hf(here / "hf")
    table = torch.randn(state["model.embed_tokens.weight"].shape)
    shutil.copytree(here / "peft", here / "tables")  # PEFT stores resized tables without naming them
    save_file(tensors | {"base_model.model.lm_head.weight": table}, here / "tables" / "adapter_model.safetensors")
    assert run("--from hf --to hf --load-dir hf --lora-load tables --save-dir out --verify") == 0
    found = load_hf(here / "out")
    assert torch.equal(found["lm_head.weight"], table)
    assert torch.equal(found["model.embed_tokens.weight"], state["model.embed_tokens.weight"])


def test_a_peft_folder_of_ours_remembers_its_base(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--from adapters --to peft --load-dir own --save-dir out") == 0  # its base need not be there
    with safe_open(here / "out" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    assert run("--from hf --to hf --load-dir other-hf --lora-load out --save-dir merged") == 2
    assert "another base than --load-dir" in capsys.readouterr().err
    assert run("--from hf --to hf --load-dir hf --lora-load out --save-dir merged") == 0


def test_a_merge_into_the_distributed_form(here: Path) -> None:
    assert run("--from hf --to hf --load-dir hf --lora-load peft --save-dir merged") == 0
    assert run("--load-dir mg --lora-load own --ckpt-format torch_dist --save-dir dist --verify") == 0
    assert run("--from megatron --to hf --load-dir dist --hf-config-dir hf --save-dir back") == 0
    merged, back = load_hf(here / "merged"), load_hf(here / "back")
    assert any(not torch.equal(merged[name], tensor) for name, tensor in load_hf(here / "hf").items())
    assert_same(back, merged)


def test_the_template_of_the_adapters_goes_where_they_go(here: Path) -> None:
    record = '{"name": "alpaca", "fingerprint": "1234"}'
    shutil.copytree(here / "own", here / "tuned")
    (here / "tuned" / "prompt_template.json").write_text(record)
    shutil.copytree(here / "hf", here / "base")
    (here / "base" / "prompt_template.json").write_text('{"name": "qwen", "fingerprint": "5678"}')
    for words, place in (("--from hf --to hf --load-dir base --lora-load tuned", "."),
                         ("--load-dir mg --lora-load tuned", "hf"),
                         ("--from adapters --to adapters --load-dir tuned --target-pipeline-parallel-size 2", "."),
                         ("--from adapters --to peft --load-dir tuned", ".")):
        assert run(f"{words} --save-dir out --overwrite") == 0
        assert (here / "out" / place / "prompt_template.json").read_text() == record
        shutil.rmtree(here / "out")
    assert run("--from hf --to hf --load-dir base --lora-load own --save-dir out") == 0
    assert "qwen" in (here / "out" / "prompt_template.json").read_text()  # adapters without a record change nothing


def test_dry_runs_of_adapters(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(here)
    for words, parts in (
            ("--from adapters --to peft --load-dir own", ("q_proj.lora_A.weight", "4 x 24")),
            ("--from adapters --to adapters --load-dir own --target-pipeline-parallel-size 2",
             ("mp_rank_00_001", "linear_fc1.up_proj.lora_B.weight", "20 x 4")),
            ("--load-dir mg --lora-dir peft", ("merging adapters of peft", "rank 4, alpha 10", "mp_rank_00_001")),
            ("--from hf --to hf --load-dir hf --lora-load own", ("merging adapters of own", "model.safetensors"))):
        assert run(f"{words} --save-dir out --dry-run") == 0
        said = capsys.readouterr().out
        assert all(part in said for part in (*parts, "nothing was written")), said
    assert tree(here) == before


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return edit


def edit_tensors(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
    return edit


def truncate(folder: Path) -> None:
    path = next(iter(sorted([*folder.rglob("adapter_model.safetensors"), *folder.rglob("model_optim_rng.pt")])))
    path.write_bytes(path.read_bytes()[:-100])


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
MERGE, ALONE = "--load-dir mg --save-dir out --lora-load", "--from adapters --save-dir out --load-dir"
NO_EDIT: Callable[[Path], Any] = lambda folder: None  # noqa: E731
# name: (folder whose copy `it` is, what is done to the copy, command, words of the one sentence)
WRONG: dict[str, tuple[str, Callable[[Path], Any], str, tuple[str, ...]]] = {
    "no such adapters": ("own", NO_EDIT, f"{MERGE} itt", ("--lora-load itt", "no such folder", "did you mean it?")),
    "a folder without adapters": ("hf", NO_EDIT, f"{MERGE} it", ("--lora-load it", "no adapter_config.json")),
    "whole weights as adapters": ("mg", NO_EDIT, f"{MERGE} it", ("--lora-load it", "no adapter_config.json")),
    "another rank": ("own", NO_EDIT, f"{MERGE} it --lora-r 8", ("--lora-r 4, but --lora-r 8 is given",)),
    "another alpha": ("peft", NO_EDIT, f"{MERGE} it --lora-alpha 8", (
        "--lora-load it", "--lora-alpha 10.0, but --lora-alpha 8.0 is given", "leave the flag out")),
    "other targets": ("original", NO_EDIT, f"{MERGE} it --lora-target-modules query_key_value", (
        "linear_fc2, but --lora-target-modules linear_qkv is given",)),
    "targets of the wrong kind": ("own", NO_EDIT, f"{MERGE} it --lora-target-modules linear_qkv", (
        "q_proj k_proj", "linear_qkv is given")),
    "unknown targets": ("own", NO_EDIT, f"{MERGE} it --lora-target-modules q_proy", ("did you mean q_proj?",)),
    "a rank of nothing": ("own", NO_EDIT, "--load-dir mg --save-dir out --lora-r 4", ("--lora-r without --lora-load",)),
    "another shape": ("own", NO_EDIT, "--from hf --load-dir wide-hf --save-dir out --lora-load it", (
        "--lora-load it", "another shape (ffn_hidden_size 40 instead of 48)")),
    "another base": ("own", NO_EDIT, "--from hf --load-dir other-hf --save-dir out --lora-load it", (
        "--lora-load it", "another base than --load-dir other-hf", "checksum")),
    "another base of the original": ("original", NO_EDIT,
                                     "--from hf --load-dir other-hf --save-dir out --lora-load it", (
                                         "row 0 of the embedding", "--load-dir other-hf")),
    "PEFT of another shape": ("peft", NO_EDIT, "--from hf --load-dir wide-hf --save-dir out --lora-load it", (
        "wrong shape", "gate_proj.lora_B.weight [40, 4] instead of [48, 4]")),
    "PEFT of another method": ("peft", edit_config(peft_type="IA3"), f"{MERGE} it", ("'IA3'", "only LORA")),
    "PEFT with ranks of its own": ("peft", edit_config(rank_pattern={"q_proj": 8}), f"{MERGE} it", (
        "rank_pattern is {'q_proj': 8}", "does not compute")),
    "PEFT with a trained bias": ("peft", edit_config(bias="all"), f"{MERGE} it", ("bias is 'all'",)),
    "PEFT that changed its base": ("peft", edit_config(init_lora_weights="pissa"), f"{MERGE} it", (
        "init_lora_weights is 'pissa'", "base weights too")),
    "PEFT without a rank": ("peft", edit_config(r=None), f"{MERGE} it", ("r is None", "numbers above 0")),
    "PEFT without one layer": ("peft", edit_tensors(lambda tensors: tensors.pop(Q0)), f"{MERGE} it", (
        "missing tensors", Q0)),
    "PEFT of another model": ("peft", edit_tensors(lambda tensors: (tensors.clear(), tensors.update(
        {"base_model.model.model.layers.0.self_attn.c_attn.lora_A.weight": torch.ones(4, 24)}))), f"{MERGE} it", (
            "no adapter of Qwen1.5's linear layers",)),
    "PEFT with a DoRA tensor it does not announce": ("peft", edit_tensors(lambda tensors: tensors.update(
        {Q0.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(24)})), f"{MERGE} it", (
            "unknown tensors", "lora_magnitude_vector")),
    "truncated PEFT weights": ("peft", truncate, f"{MERGE} it", ("not a whole safetensors file",)),
    "truncated rank file": ("own", truncate, f"{MERGE} it", ("not a whole torch checkpoint file",)),
    "a rank is missing": ("own", lambda folder: shutil.rmtree(next(folder.glob("*/mp_rank_01"))), f"{MERGE} it", (
        "mp_rank_01", "no such file")),
    "a broken adapter_config": ("own", lambda folder: (folder / "adapter_config.json").write_text("{"), f"{MERGE} it", (
        "adapter_config.json", "not valid JSON")),
    "optimizer of a merge": ("own", NO_EDIT, f"{MERGE} it --keep-optimizer", ("--keep-optimizer with --lora-load",)),
    "HF to HF without adapters": ("hf", NO_EDIT, "--from hf --to hf --load-dir it --save-dir out", ("--lora-load",)),
    "adapters to weights": ("own", NO_EDIT, f"{ALONE} it --to hf", ("--from adapters with --to hf", "--to peft")),
    "weights to adapters": ("hf", NO_EDIT, "--from hf --to peft --load-dir it --save-dir out", (
        "--to peft with --from hf", "--from adapters")),
    "PEFT without its base": ("peft", NO_EDIT, f"{ALONE} it --to adapters", (
        "--base-dir is missing", "it does not describe the model")),
    "a base of nothing": ("mg", NO_EDIT, "--load-dir it --save-dir out --base-dir hf", ("--base-dir hf belongs to",)),
    "no such base": ("peft", NO_EDIT, f"{ALONE} it --to adapters --base-dir hff", ("--base-dir hff", "no such folder")),
    "adapters of another base": ("own", NO_EDIT, f"{ALONE} it --to peft --base-dir other-hf", (
        "--load-dir it", "another base than --base-dir other-hf")),
    "a cut PEFT folder": ("own", NO_EDIT, f"{ALONE} it --to peft --target-tensor-parallel-size 2", (
        "--target-tensor-parallel-size", "a PEFT folder is not cut")),
    "a layout that cannot be": ("own", NO_EDIT, f"{ALONE} it --to adapters --target-pipeline-parallel-size 3", (
        "num_layers 4 is not divisible by pipeline parallel size 3",)),
    "names that adapters have not": ("own", NO_EDIT, f"{ALONE} it --to adapters --save-legacy-names", (
        "--save-legacy-names with --from adapters", "whole weights")),
    "adapters onto themselves": ("own", NO_EDIT, "--from adapters --to adapters --load-dir it --save-dir it "
                                                 "--overwrite", ("--save-dir it", "choose another folder")),
    "adapters over something": ("own", NO_EDIT, "--from adapters --to peft --load-dir it --save-dir peft", (
        "peft: already holds adapter_config.json", "--overwrite")),
    "no alpha anywhere": ("original", lambda folder: save_without_alpha(folder), f"{MERGE} it", (
        "do not say lora_alpha", "--lora-alpha")),
}


def save_without_alpha(folder: Path) -> None:
    for path in folder.rglob("model_optim_rng.pt"):
        state = torch.load(path, weights_only=False)
        del state["args"].lora_alpha
        torch.save(state, path)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_sentence_and_leaves_nothing(name: str, here: Path,
                                                        capfd: pytest.CaptureFixture[str]) -> None:
    source, edit, command, parts = WRONG[name]
    shutil.copytree(here / source, here / "it")
    edit(here / "it")
    before = tree(here)
    assert run(command) == 2
    said = capfd.readouterr().err.strip().split("\n")
    assert len(said) == 1 and said[0].startswith("error: ") and said[0].endswith((".", "?")), said
    for part in parts:
        assert part in said[0], said[0]
    assert tree(here) == before
