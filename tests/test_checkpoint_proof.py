"""`--verify` notices what it must, `--dry-run` reads headers only, `modellink checkpoint show` says what is there."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from checkpoint_folders import make_hf, tree
from safetensors.torch import load_file, save_file
from tiny import save_tiny

from modellink.checkpoint.convert import main
from modellink.checkpoint.forward import HFForward, forward_of
from modellink.checkpoint.hf import open_hf
from modellink.checkpoint.megatron import open_megatron, save_rank_file
from modellink.checkpoint.qwen15 import chunk_rules
from modellink.checkpoint.rules import Rule
from modellink.checkpoint.verify import verify
from modellink.cli import dispatch
from modellink.config import run_command
from modellink.config.errors import ConfigError
from modellink.models.presets.qwen15 import PRESETS


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(text: str) -> int:
    return run_command(main, shlex.split(text))


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2, "tie_word_embeddings": True}])
def test_the_own_forward_pass_equals_transformers(changes: dict) -> None:
    reference = save_tiny(Path("hf"), **changes).double()
    assert run("--from hf --load-dir hf --save-dir mg --target-tensor-parallel-size 2 "
               "--target-pipeline-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1") == 0
    ids = torch.randint(0, 1003, (29,), generator=torch.Generator().manual_seed(2))
    wanted = reference(ids[None]).logits[0].detach()
    for source in (open_hf(Path("hf")), open_megatron(Path("mg"))):
        passes = forward_of(source, source.model)
        x = passes.embed(ids)
        for layer in range(source.model.num_layers):
            x = passes.layer(layer, x)
        # transformers computes norms and rotary tables in fp32
        assert (passes.logits(x) - wanted).abs().max() < 2e-5 * wanted.abs().max()


def wrong_packing(rule: Rule) -> Rule:
    """All queries, then all keys, then all values: self-consistent both ways, and wrong."""
    return Rule(rule.megatron, rule.hf, rule.dim, units=None, padded=rule.padded) if rule.units else rule


def test_verify_notices_a_wrong_rule_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways through a wrong table are bit-exact; the logits are not, because they do not go through it."""
    make_hf(Path("hf"))
    from modellink.checkpoint import chunks, megatron

    def broken(*args: object) -> list[tuple[str, Rule]]:
        return [(name, wrong_packing(rule)) for name, rule in chunk_rules(*args)]  # type: ignore[arg-type]

    monkeypatch.setattr(chunks, "chunk_rules", broken)
    monkeypatch.setattr(megatron, "chunk_rules", broken)
    assert run("--from hf --load-dir hf --save-dir unnoticed") == 0
    assert run("--to hf --load-dir unnoticed --save-dir back") == 0
    assert all(torch.equal(tensor, load_file("back/model.safetensors")[name])
               for name, tensor in load_file("hf/model.safetensors").items())
    assert run("--from hf --load-dir hf --save-dir out --verify") == 2
    assert not Path("out").exists()


def damage(change: str) -> None:
    path = Path("mg/iter_0000001/mp_rank_01_001/model_optim_rng.pt")
    saved = torch.load(path, weights_only=False)
    model = saved["model"]
    if change == "one bit":
        table = model["decoder.layers.1.mlp.linear_fc2.weight"].view(torch.int16)
        table[3, 4] ^= 1
    elif change == "swapped ranks":
        other = torch.load(str(path).replace("mp_rank_01", "mp_rank_00"), weights_only=False)
        saved["model"] = other["model"]
    elif change == "tied head":
        model["output_layer.weight"][5] += 1
    save_rank_file(path, saved)


@pytest.mark.parametrize("change, tie, words", [
    ("one bit", False, "1 of 51 tensors differ between source and result, the first is model.layers.3.mlp.down_proj"),
    ("swapped ranks", False, "tensors differ between source and result"),
    ("tied head", True, "the logits of source and result differ beyond rounding (in the embedding, the final norm"),
])
def test_verify_names_what_differs(change: str, tie: bool, words: str) -> None:
    make_hf(Path("hf"), tie=tie)
    assert run("--from hf --load-dir hf --save-dir mg --target-tensor-parallel-size 2 "
               "--target-pipeline-parallel-size 2") == 0
    source = open_hf(Path("hf"))
    verify(source, open_megatron(Path("mg")), source.model, None, say=lambda line: None)
    damage(change)
    with pytest.raises(ConfigError) as caught:
        verify(source, open_megatron(Path("mg")), source.model, None, say=lambda line: None)
    assert words in str(caught.value)


def test_verify_allows_the_cast_that_was_asked_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    make_hf(Path("hf"), torch.float32)
    assert run("--from hf --load-dir hf --save-dir cast --params-dtype bf16 --verify") == 0
    out = capsys.readouterr().out
    assert "51 tensors agree bit by bit after the cast to bfloat16" in out
    line = next(line for line in out.splitlines() if "effect of the cast torch.float32 -> torch.bfloat16" in line)
    assert float(line.split("largest difference ")[1].split()[0]) > 1e-3 and "KL" in line
    source = open_hf(Path("hf"))
    with pytest.raises(ConfigError, match="tensors differ"):
        verify(source, open_megatron(Path("cast")), source.model, None, say=lambda line: None)
    assert isinstance(forward_of(source, source.model), HFForward)


def header_only_folder(folder: Path, size: str) -> int:
    """A HF folder of a preset whose safetensors files end behind their headers; returns the bytes they promise."""
    from modellink.checkpoint.qwen15 import hf_rules

    model = PRESETS[size]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.to_hf()))
    names = [tensor for tensor, _ in hf_rules(model).values()]
    half, total, weight_map = len(names) // 2, 0, {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        header, offset = {}, 0
        for tensor in part:
            end = offset + 2 * torch.Size(tensor.shape).numel()
            header[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
            offset = end
            weight_map[tensor.name] = f"model-{number:05d}-of-00002.safetensors"
        text = json.dumps(header).encode()
        (folder / f"model-{number:05d}-of-00002.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
        total += offset
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


@pytest.mark.parametrize("size, tensor, pipeline, more, words", [
    ("qwen15-0.5b", 1, 1, "", ["iter_0000001/mp_rank_00 ", "0-23 +embedding +head"]),
    ("qwen15-7b", 8, 1, "", ["mp_rank_00 .. rank_07", "1536 x 4096", "2752 x 4096", "4096 x 512", "18992 x 4096"]),
    ("qwen15-32b", 8, 4, "--num-layers-per-virtual-pipeline-stage 2", ["0-1 +embedding, 8-9, 16-17", "62-63 +head"]),
    ("qwen15-72b", 8, 8, "--decoder-first-pipeline-num-layers 9 --decoder-last-pipeline-num-layers 11",
     ["0-8 +embedding", "69-79 +head"]),
    ("qwen15-110b", 8, 8, "--transformer-impl transformer_engine", ["70-79 +head", "linear_qkv.layer_norm_weight"]),
])
def test_dry_run_of_every_size_from_headers(size: str, tensor: int, pipeline: int, more: str, words: list[str],
                                            capsys: pytest.CaptureFixture[str]) -> None:
    promised = header_only_folder(Path("hf"), size)
    before = tree(Path())
    assert run(f"--from hf --load-dir hf --save-dir out --target-tensor-parallel-size {tensor} {more} "
               f"--target-pipeline-parallel-size {pipeline} --dry-run") == 0
    out = capsys.readouterr().out
    for word in words:
        assert word in out
    model = PRESETS[size]
    each = [int(line.split()[-1].replace(",", "")) for line in out.splitlines() if line.startswith("iter_")]
    norms = (2 * model.num_layers + 1) * model.hidden_size * 2 * (tensor - 1)  # every tensor rank holds the norms
    padding = 2 * model.hidden_size * (model.padded_vocab_size(tensor) - model.vocab_size) * 2
    assert len(each) == pipeline and sum(each) * tensor == promised + norms + padding
    assert f"{sum(each) * tensor:,} bytes are needed" in out
    assert tree(Path()) == before
    assert run("--from hf --load-dir hf --save-dir out") == 2  # the tensors are really not there


def test_dry_run_of_an_export_and_what_it_excludes(capsys: pytest.CaptureFixture[str]) -> None:
    make_hf(Path("hf"))
    assert run("--from hf --load-dir hf --save-dir mg --target-tensor-parallel-size 2") == 0
    before = tree(Path())
    capsys.readouterr()
    assert run("--to hf --load-dir mg --save-dir out --dry-run") == 0
    out = capsys.readouterr().out
    assert "model.safetensors" in out and "model.layers.N.self_attn.k_proj.weight" in out
    for more in ("--verify", "--verify-checksums"):
        assert run(f"--to hf --load-dir mg --save-dir out --dry-run {more}") == 2
    assert tree(Path()) == before


def shown(text: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert run_command(dispatch, shlex.split(f"checkpoint show {text}")) == 0
    return capsys.readouterr().out


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    make_hf(Path("hf"))
    out = shown("hf", capsys)
    for words in ("HF folder, safetensors, 1 file", "4 layers, hidden 24", "head its own", "bfloat16 (51 tensors)",
                  "45,776 bytes of weights", "rope base 5e+06"):
        assert words in out
    assert run_command(dispatch, shlex.split(
        "checkpoint convert --from hf --load-dir hf --save-dir mg --target-tensor-parallel-size 2 "
        "--num-layer-list 1,3 --target-pipeline-parallel-size 2 --transformer-impl transformer_engine")) == 0
    out = shown("mg --verify-checksums", capsys)
    for words in ("Megatron checkpoint", "TP2 PP2 with 1,3 layers", "Transformer Engine", "step        1 (iter_0000001",
                  "no optimizer state", "101 rows, stored as 102", "checksums of 4 files"):
        assert words in out
    assert run("--load-dir mg --save-dir old --save-legacy-names") == 0
    assert "language_model" in shown("old", capsys)
    state = load_file("hf/model.safetensors")
    Path("hf/model.safetensors").unlink()
    torch.save({**state, "model.norm.weight": state["model.norm.weight"].float()}, "hf/pytorch_model.bin")
    out = shown("hf", capsys)
    assert "pickled by torch" in out and "bfloat16 (50 tensors), float32 (1 tensors)" in out


@pytest.mark.parametrize("words, message", [
    ("checkpoint show mgg", "mgg: no such folder"),
    ("checkpoint show .", "no Megatron checkpoint in it"),
    ("checkpoint sow mg", "unknown job sow; choose show or convert"),
    ("checkpoint show", "the following arguments are required: DIR"),
])
def test_show_errors(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(dispatch, shlex.split(words)) == 2
    assert message in capsys.readouterr().err


def test_a_shard_that_repeats_a_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    state = make_hf(Path("hf"))
    Path("hf/model.safetensors").unlink()
    save_file(state, "hf/a.safetensors")
    save_file({"model.norm.weight": state["model.norm.weight"] + 1}, "hf/b.safetensors")
    weight_map = {**dict.fromkeys(state, "a.safetensors"), "model.norm.weight": "b.safetensors"}
    Path("hf/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert run("--from hf --load-dir hf --save-dir out") == 2
    assert "model.norm.weight is in another file of hf too" in capsys.readouterr().err
