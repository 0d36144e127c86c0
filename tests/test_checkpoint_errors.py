"""Wrong inputs of the converter: one sentence, exit code 2, nothing written or changed."""

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_folders import make_hf, tree
from safetensors.torch import load_file, save_file

from modellink.checkpoint.convert import main
from modellink.checkpoint.rank_file import save_rank_file
from modellink.config import run_command
from modellink.config.errors import ConfigError

TO_MG = "--from hf --to megatron --load-dir hf --save-dir out"
TO_HF = "--from megatron --to hf --load-dir mg --save-dir out"
RANK0 = Path("mg/iter_0000001/mp_rank_00_000/model_optim_rng.pt")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `hf` and its checkpoint `mg` in TP2 PP2."""
    monkeypatch.chdir(tmp_path)
    make_hf(Path("hf"))
    assert (
        main(
            shlex.split(
                "--from hf --load-dir hf --save-dir mg --target-tensor-parallel-size 2 "
                "--target-pipeline-parallel-size 2"
            )
        )
        == 0
    )
    return tmp_path


def change_config(**changes: object) -> None:
    path = Path("hf/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = Path("hf/model.safetensors")
    state = load_file(path)
    change(state)
    save_file(state, path)


def change_rank(change: Callable[[dict], object]) -> None:
    state = torch.load(RANK0, weights_only=False)
    change(state)
    torch.save(state, RANK0)


def cut(path: str, keep: float = 0.6) -> None:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: int(len(content) * keep)])


def shard_index(*names: str) -> None:
    """Replace the single file by an index that names `names`."""
    state = load_file("hf/model.safetensors")
    Path("hf/model.safetensors").rename("hf/model-00001-of-00002.safetensors")
    weight_map = {name: names[number % len(names)] for number, name in enumerate(state)}
    Path("hf/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def nothing() -> None:
    pass


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
CASES: dict[str, tuple[Callable[[], object], str, list[str]]] = {
    "load-dir misspelt": (nothing, TO_MG.replace("-dir hf", "-dir hff"), ["hff: no such folder", "did you mean hf?"]),
    "load-dir is a file": (nothing, TO_MG.replace("-dir hf", "-dir hf/config.json"), ["is a file, not a folder"]),
    "load-dir not given": (nothing, "--from hf --save-dir out", ["--load-dir is missing"]),
    "save-dir not given": (nothing, "--from hf --load-dir hf", ["--save-dir is missing"]),
    "hf folder one deeper": (
        lambda: (Path("up").mkdir(), Path("hf").rename("up/hf")),
        TO_MG.replace("-dir hf", "-dir up"),
        ["up/config.json: no such file", "there is one in up/hf"],
    ),
    "megatron folder given as hf": (
        nothing,
        TO_MG.replace("-dir hf", "-dir mg"),
        ["Megatron checkpoint", "--loader megatron"],
    ),
    "hf folder given as megatron": (
        nothing,
        TO_HF.replace("-dir mg", "-dir hf"),
        ["holds a HF model", "--loader llama2_hf"],
    ),
    "config is a web page": (
        lambda: Path("hf/config.json").write_text("<!DOCTYPE html><html></html>"),
        TO_MG,
        ["hf/config.json", "HTML page"],
    ),
    "config is an lfs pointer": (
        lambda: Path("hf/config.json").write_text(LFS),
        TO_MG,
        ["hf/config.json", "git-lfs pointer"],
    ),
    "config is cut": (lambda: cut("hf/config.json"), TO_MG, ["hf/config.json: not valid JSON", "line 1"]),
    "config is a list": (lambda: Path("hf/config.json").write_text("[1]"), TO_MG, ["holds a list"]),
    "config of another model": (lambda: change_config(model_type="llama"), TO_MG, ["'llama'", "'qwen2'"]),
    "config without hidden_size": (lambda: change_config(hidden_size=None), TO_MG, ["hidden_size"]),
    "weights are an lfs pointer": (
        lambda: Path("hf/model.safetensors").write_text(LFS),
        TO_MG,
        ["hf/model.safetensors", "git-lfs pointer"],
    ),
    "weights are a web page": (
        lambda: Path("hf/model.safetensors").write_text("<html>not found</html>"),
        TO_MG,
        ["hf/model.safetensors", "HTML page"],
    ),
    "weights are cut": (
        lambda: cut("hf/model.safetensors"),
        TO_MG,
        ["hf/model.safetensors: not a whole safetensors file"],
    ),
    "weights are empty": (lambda: Path("hf/model.safetensors").write_bytes(b""), TO_MG, ["the file is empty"]),
    "weights are missing": (lambda: Path("hf/model.safetensors").unlink(), TO_MG, ["neither model.safetensors nor"]),
    "weights are pickled": (
        lambda: Path("hf/model.safetensors").rename("hf/pytorch_model.bin"),
        TO_MG,
        ["pytorch_model.bin: not a whole torch checkpoint file"],
    ),
    "index names a missing shard": (
        lambda: shard_index("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        TO_MG,
        ["index.json", "model-00002-of-00002.safetensors"],
    ),
    "index without map": (
        lambda: (shard_index("x"), Path("hf/model.safetensors.index.json").write_text("{}")),
        TO_MG,
        ["no weight_map"],
    ),
    "unknown tensor": (
        lambda: change_weights(lambda state: state.update(extra=torch.zeros(2))),
        TO_MG,
        ["unknown tensors: extra;"],
    ),
    "missing tensor": (
        lambda: change_weights(lambda state: state.pop("model.layers.2.mlp.up_proj.weight")),
        TO_MG,
        ["missing tensors: model.layers.2.mlp.up_proj.weight;"],
    ),
    "misshapen tensor": (
        lambda: change_weights(lambda state: state.update({"model.norm.weight": torch.zeros(23)})),
        TO_MG,
        ["model.norm.weight [23] instead of [24]"],
    ),
    "vocabulary of config differs": (
        lambda: change_config(vocab_size=100),
        TO_MG,
        ["model.embed_tokens.weight [101, 24] instead of [100, 24]"],
    ),
    "tied head differs": (
        lambda: change_config(tie_word_embeddings=True),
        TO_MG,
        ["tie_word_embeddings", "lm_head.weight"],
    ),
    "quantised weights": (
        lambda: change_weights(lambda state: state.update({"model.norm.weight": torch.zeros(24, dtype=torch.int8)})),
        TO_MG,
        ["model.norm.weight is stored as I8"],
    ),
    "kv groups not divisible": (
        nothing,
        f"{TO_MG} --target-tensor-parallel-size 6",
        ["num_query_groups 2 is not", "choose one of 1, 2.", "ffn_hidden_size 40 is not"],
    ),
    "layers not divisible": (nothing, f"{TO_MG} --target-pipeline-parallel-size 3", ["num_layers 4", "3"]),
    "virtual layers not divisible": (
        nothing,
        f"{TO_MG} --target-pipeline-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3",
        ["--num-layers-per-virtual-pipeline-stage 3", "num_layers 4"],
    ),
    "virtual without pipeline": (
        nothing,
        f"{TO_MG} --num-layers-per-virtual-pipeline-stage 2",
        ["2 virtual stages need"],
    ),
    "size zero": (
        nothing,
        f"{TO_MG} --target-tensor-parallel-size 0",
        ["--target-tensor-parallel-size 0: must be 1 or more"],
    ),
    "size is a word": (nothing, f"{TO_MG} --target-tensor-parallel-size two", ["invalid int value: 'two'"]),
    "existing target": (lambda: shutil.copytree("mg", "out"), TO_MG, ["out: already holds latest_", "--overwrite"]),
    "target full of other files": (lambda: (Path("out").mkdir(), Path("out/a").touch()), TO_MG, ["out: is not empty"]),
    "target is a file": (lambda: Path("out").touch(), TO_MG, ["out: is a file"]),
    "target is the source": (
        nothing,
        "--from hf --load-dir hf --save-dir ./hf/ --overwrite",
        ["folder the weights are read from"],
    ),
    "unknown loader": (nothing, TO_MG.replace("--from hf", "--loader chatglm3_hf"), ["chatglm3_hf", "llama2_hf"]),
    "unknown flag": (
        nothing,
        f"{TO_MG} --target-tensor-paralel-size 2",
        ["did you mean --target-tensor-parallel-size"],
    ),
    "tokenizer missing": (
        nothing,
        f"{TO_MG} --tokenizer-model hf/tokeniser.json",
        ["hf/tokeniser.json", "did you mean hf/tokenizer.json"],
    ),
    "config dir for megatron": (nothing, f"{TO_MG} --hf-config-dir hf", ["--hf-config-dir hf belongs to an export"]),
    "hf to hf": (
        nothing,
        TO_MG.replace("--to megatron", "--to hf"),
        ["reads a HF folder and the target is a HF folder"],
    ),
    "hf target with tp": (
        nothing,
        f"{TO_HF} --target-tensor-parallel-size 2",
        ["--target-tensor-parallel-size 2", "must be 1"],
    ),
    "hf target with pp": (nothing, f"{TO_HF} --target-pipeline-parallel-size 2", ["--target-pipeline-parallel-size 2"]),
    "source has no virtual stages": (
        nothing,
        f"{TO_HF} --num-layers-per-virtual-pipeline-stage 1",
        ["--num-layers-per-virtual-pipeline-stage 1", "no virtual stages (TP2 PP2)"],
    ),
    "checkpoint one deeper": (nothing, TO_HF.replace("-dir mg", "-dir ."), ["one folder deeper: give mg"]),
    "checkpoint one higher": (
        nothing,
        TO_HF.replace("-dir mg", "-dir mg/iter_0000001"),
        ["lies inside the checkpoint", "mg;"],
    ),
    "no checkpoint": (
        lambda: Path("empty").mkdir(),
        TO_HF.replace("-dir mg", "-dir empty"),
        ["no Megatron checkpoint in it"],
    ),
    "tracker missing": (
        lambda: Path("mg/latest_checkpointed_iteration.txt").unlink(),
        TO_HF,
        ["iteration folders but no latest_"],
    ),
    "tracker names nothing": (
        lambda: Path("mg/latest_checkpointed_iteration.txt").write_text("7"),
        TO_HF,
        ["names iteration 7", "iter_0000007", "iter_0000001"],
    ),
    "tracker is words": (lambda: Path("mg/latest_checkpointed_iteration.txt").write_text("last"), TO_HF, ["'last'"]),
    "rank file missing": (
        lambda: Path("mg/iter_0000001/mp_rank_01_001/model_optim_rng.pt").unlink(),
        TO_HF,
        ["mp_rank_01_001/model_optim_rng.pt: no such file"],
    ),
    "rank folder missing": (lambda: shutil.rmtree("mg/iter_0000001/mp_rank_00_000"), TO_HF, ["neither mp_rank_00 nor"]),
    "rank file cut": (
        lambda: cut("mg/iter_0000001/mp_rank_01_000/model_optim_rng.pt"),
        TO_HF,
        ["mp_rank_01_000/model_optim_rng.pt: not a whole torch checkpoint"],
    ),
    "distributed checkpoint": (lambda: Path("mg/iter_0000001/metadata.json").write_text("{}"), TO_HF, ["torch_dist"]),
    "checkpoint without args": (lambda: change_rank(lambda state: state.pop("args")), TO_HF, ["no args in it"]),
    "checkpoint of another family": (
        lambda: change_rank(lambda state: setattr(state["args"], "normalization", "LayerNorm")),
        TO_HF,
        ["'LayerNorm'", "'RMSNorm'"],
    ),
    "legacy checkpoint": (
        lambda: change_rank(lambda state: state.update(model={"language_model": {}})),
        TO_HF,
        ["embedding.word_embeddings.weight is missing from the first pipeline stage"],
    ),
    "checkpoint lacks a tensor": (
        lambda: change_rank(lambda state: state["model"].pop("decoder.layers.1.mlp.linear_fc2.weight")),
        TO_HF,
        ["missing tensors: decoder.layers.1.mlp.linear_fc2.weight;"],
    ),
    "checkpoint lacks the bias": (
        lambda: change_rank(lambda state: state["model"].pop("decoder.layers.0.self_attention.linear_qkv.bias")),
        TO_HF,
        ["missing tensors: decoder.layers.0.self_attention.linear_qkv.bias;"],
    ),
    "checkpoint has too much": (
        lambda: change_rank(lambda state: state["model"].update({"decoder.layers.2.x": torch.zeros(1)})),
        TO_HF,
        ["unknown tensors: decoder.layers.2.x;"],
    ),
    "checkpoint misshapen": (
        lambda: change_rank(
            lambda state: state["model"].update({"decoder.layers.0.mlp.linear_fc1.weight": torch.zeros(3, 24)})
        ),
        TO_HF,
        ["linear_fc1.weight [3, 24] instead of [40, 24]"],
    ),
    "args of another layout": (
        lambda: change_rank(lambda state: setattr(state["args"], "virtual_pipeline_model_parallel_size", 2)),
        TO_HF,
        ["'model0' is missing", "TP2 PP2 VPP2"],
    ),
    "no workers": (nothing, f"{TO_MG} --workers 0", ["--workers 0: must be 1 or more"]),
    "dry run that verifies": (nothing, f"{TO_MG} --dry-run --verify", ["--dry-run reads no tensor data"]),
    "list of layers for another pipeline": (
        nothing,
        f"{TO_MG} --num-layer-list 2,2 --target-pipeline-parallel-size 4",
        ["--num-layer-list 2,2: 2 numbers for pipeline parallel size 4"],
    ),
    "list of layers that does not add up": (
        nothing,
        f"{TO_MG} --num-layer-list 2,3 --target-pipeline-parallel-size 2",
        ["--num-layer-list 2,3", "their sum 5 must be num_layers 4"],
    ),
    "list of layers of words": (
        nothing,
        f"{TO_MG} --num-layer-list 2;2 --target-pipeline-parallel-size 2",
        ["--num-layer-list 2", "must be whole numbers with commas"],
    ),
    "uneven stages and virtual stages": (
        nothing,
        f"{TO_MG} --num-layer-list 1,3 --target-pipeline-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
        ["virtual stages need the same number of layers in every pipeline stage"],
    ),
    "first stage with one stage": (
        nothing,
        f"{TO_MG} --decoder-first-pipeline-num-layers 2",
        ["--decoder-first-pipeline-num-layers 2: uneven stages need a pipeline parallel size of 2 or more"],
    ),
    "first stage too large": (
        nothing,
        f"{TO_MG} --decoder-first-pipeline-num-layers 4 --target-pipeline-parallel-size 2",
        ["leaves 0 of 4 layers for 1 other stages"],
    ),
    "uneven stages of a hf folder": (nothing, f"{TO_HF} --num-layer-list 1,3", ["--num-layer-list: a HF folder"]),
    "legacy names of a hf folder": (nothing, f"{TO_HF} --save-legacy-names", ["--save-legacy-names: a HF folder"]),
    "two spellings": (
        nothing,
        f"{TO_MG} --save-legacy-names --transformer-impl transformer_engine",
        ["are two spellings of the same tensors"],
    ),
    "optimizer that is not there": (
        nothing,
        "--load-dir mg --save-dir out --keep-optimizer",
        ["--keep-optimizer: mg/iter_0000001 has no optimizer state"],
    ),
    "optimizer for another layout": (
        lambda: change_rank(lambda state: state.update(optimizer={})),
        "--load-dir mg --save-dir out --keep-optimizer --target-tensor-parallel-size 1",
        ["--keep-optimizer: the layout would change from TP2 PP2 to TP1 PP2"],
    ),
    "optimizer for other names": (
        lambda: change_rank(lambda state: state.update(optimizer={})),
        "--load-dir mg --save-dir out --keep-optimizer --transformer-impl transformer_engine",
        ["--keep-optimizer: the names would change from local to transformer_engine"],
    ),
    "checksums that were never written": (
        nothing,
        f"{TO_MG} --verify-checksums",
        ["hf: no modellink_manifest.json in it"],
    ),
    "manifest of something else": (
        lambda: Path("mg/iter_0000001/modellink_manifest.json").write_text("[]"),
        f"{TO_HF} --verify-checksums",
        ["modellink_manifest.json: not a manifest of this program"],
    ),
    "file of the manifest missing": (
        lambda: Path("mg/iter_0000001/modellink_manifest.json").write_text(
            '{"files": {"gone.pt": {"bytes": 1, "crc32": "00"}}}'
        ),
        f"{TO_HF} --verify-checksums",
        ["gone.pt: is in modellink_manifest.json but not on disk"],
    ),
    "rank files of different dtypes": (
        lambda: change_rank(
            lambda state: state["model"].update(
                {"decoder.layers.0.mlp.linear_fc1.weight": torch.zeros(40, 24, dtype=torch.float32)}
            )
        ),
        TO_HF,
        ["decoder.layers.0.mlp.linear_fc1.weight is bfloat16, but float32 in another tensor parallel rank"],
    ),
    "rank file of whole numbers": (
        lambda: change_rank(
            lambda state: state["model"].update(
                {"decoder.layers.0.mlp.linear_fc1.weight": torch.zeros(40, 24, dtype=torch.int8)}
            )
        ),
        TO_HF,
        ["linear_fc1.weight is stored as int8"],
    ),
    "checkpoint of 2020": (
        lambda: change_rank(lambda state: state.update(checkpoint_version=1.0)),
        TO_HF,
        ["checkpoint_version 1.0 packs query, key and value in another order"],
    ),
    "checkpoint of a free pipeline layout": (
        lambda: change_rank(lambda state: setattr(state["args"], "pipeline_model_parallel_layout", "Et*2|t*2L")),
        TO_HF,
        ["pipeline_model_parallel_layout 'Et*2|t*2L'"],
    ),
    "checkpoint of impossible stages": (
        lambda: change_rank(lambda state: setattr(state["args"], "num_layer_list", "1,1")),
        TO_HF,
        ["the saved args have num_layer_list 1,1", "their sum 2 must be num_layers 4"],
    ),
    "pickled weights of another kind": (
        lambda: (Path("hf/model.safetensors").unlink(), torch.save({"epoch": 3}, "hf/pytorch_model.bin")),
        TO_MG,
        ["hf/pytorch_model.bin: epoch is a int, but a file of HF weights holds tensors only"],
    ),
    "index that points outside": (
        lambda: shard_index("../mg/x.safetensors"),
        TO_MG,
        ["names '../mg/x.safetensors', which is not a file of this folder"],
    ),
    "index is a list": (
        lambda: (shard_index("x"), Path("hf/model.safetensors.index.json").write_text("[]")),
        TO_MG,
        ["no weight_map"],
    ),
    "config dir misspelt": (nothing, f"{TO_HF} --hf-config-dir hff", ["hff: no such folder", "did you mean hf?"]),
    "config contradicts checkpoint": (
        lambda: change_config(rope_theta=10000.0),
        f"{TO_HF} --hf-config-dir hf",
        ["rope_theta is 10000.0 in hf/config.json, but 5000000.0 in the checkpoint"],
    ),
    "config has another vocabulary": (
        lambda: change_config(vocab_size=99),
        f"{TO_HF} --hf-config-dir hf",
        ["vocab_size is 99 in hf/config.json", "has 101 rows"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_one_sentence_and_leaves_nothing(
    case: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, command, messages = CASES[case]
    prepare()
    before = tree(work)
    capsys.readouterr()
    assert run_command(main, shlex.split(command)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for message in messages:
        assert message in error
    lines = error.splitlines()
    assert all(line.startswith("error: ") and line.endswith((".", "?")) for line in lines)
    assert len(lines) == (2 if case == "kv groups not divisible" else 1)
    assert tree(work) == before


def test_all_problems_come_at_once(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("mg", "out")
    assert run_command(main, shlex.split(f"{TO_MG} --target-pipeline-parallel-size 3 --add-dense-bias")) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 3
    assert "num_layers 4" in error and "--add-dense-bias" in error and "--overwrite" in error


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with given options; needs root."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("direction", [TO_MG, TO_HF])
@pytest.mark.parametrize(
    "options, message",
    [
        ("size=32k", "are free on that disk"),  # seen before anything is written
        ("size=48k", "No space left on device"),  # the tensors alone would fit: seen only while writing
        ("size=50m,nr_inodes=3", "No space left on device"),
    ],
)
def test_full_disk_is_one_sentence_and_leaves_nothing(
    direction: str,
    options: str,
    message: str,
    work: Path,
    small_disk: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk = small_disk(options)
    capsys.readouterr()
    assert run_command(main, shlex.split(direction.replace("-dir out", f"-dir {disk}/deep/out"))) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert tree(disk) == {}


def test_a_rank_file_that_fills_the_disk_leaves_the_old_one(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=1m")
    save_rank_file(disk / "model_optim_rng.pt", {"model": {"a": torch.zeros(50_000)}})
    before = tree(disk)
    with pytest.raises(ConfigError, match="No space left on device"):
        save_rank_file(
            disk / "model_optim_rng.pt", {"model": {f"{number}": torch.zeros(50_000) for number in range(8)}}
        )
    assert tree(disk) == before
