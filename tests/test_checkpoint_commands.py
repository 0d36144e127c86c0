"""The conversion commands of the original README, word for word, on small weights; and what each flag does."""

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_folders import assert_same, load_hf, make_hf
from transformers import Qwen2ForCausalLM

from modellink.checkpoint.convert import main
from modellink.checkpoint.convert_flags import SECTIONS
from modellink.checkpoint.hf import hf_tensors, open_hf, write_weights
from modellink.checkpoint.layout import Layout
from modellink.checkpoint.megatron import open_megatron
from modellink.config import run_command

TOOL = Path(__file__).parents[1] / "tools" / "checkpoint" / "convert_ckpt.py"
MHA8 = {"heads": 8, "groups": 8, "hidden": 32, "ffn": 48, "vocab": 203}
GQA8 = {"heads": 16, "groups": 8, "hidden": 32, "ffn": 48, "vocab": 203}

# size -> (sizes of the small stand-in, the README's command, layout, padded vocabulary)
TO_MEGATRON = {
    "0.5B": (
        {"layers": 2, "tie": True, "heads": 4, "groups": 4},
        """
        python tools/checkpoint/convert_ckpt.py --model-type GPT --loader llama2_hf --saver megatron
        --target-tensor-parallel-size 1 --load-dir ./model_from_hf/Qwen1.5-0.5B/
        --save-dir ./model_weights/Qwen1.5-0.5B-v0.1-tp1-pp1/
        --tokenizer-model ./model_from_hf/Qwen1.5-0.5B/tokenizer.json --add-qkv-bias""",
        Layout(),
        101,
    ),
    "1.8B": (
        {"layers": 2, "heads": 4, "groups": 4},
        """
        python tools/checkpoint/convert_ckpt.py --model-type GPT --loader llama2_hf --saver megatron
        --target-tensor-parallel-size 1 --target-pipeline-parallel-size 1 --make-vocab-size-divisible-by 1
        --load-dir ./model_from_hf/Qwen1.5-1.8B/ --save-dir ./model_weights/Qwen1.5-1.8B-v0.1-tp1-pp1/
        --tokenizer-model ./model_from_hf/Qwen1.5-1.8B/tokenizer.json --add-qkv-bias --params-dtype bf16""",
        Layout(),
        101,
    ),
    "4B": (
        {"layers": 4, "heads": 4, "groups": 4},
        """
        python tools/checkpoint/convert_ckpt.py --model-type GPT --loader llama2_hf --saver megatron
        --target-tensor-parallel-size 1 --target-pipeline-parallel-size 2
        --load-dir ./model_from_hf/Qwen1.5-4B/ --save-dir ./model_weights/Qwen1.5-4B-v0.1-tp1-pp2/
        --tokenizer-model ./model_from_hf/Qwen1.5-4B/tokenizer.json --add-qkv-bias --params-dtype bf16""",
        Layout(1, 2),
        101,
    ),
    "7B": (
        {"layers": 2, **MHA8},
        """
        python tools/checkpoint/convert_ckpt.py --model-type GPT --loader llama2_hf --saver megatron
        --target-tensor-parallel-size 8 --make-vocab-size-divisible-by 16
        --load-dir ./model_from_hf/Qwen1.5-7B/ --save-dir ./model_weights/Qwen1.5-7B-v0.1-tp8-pp1/
        --tokenizer-model ./model_from_hf/Qwen1.5-7B/tokenizer.json --add-qkv-bias --params-dtype bf16""",
        Layout(8),
        256,
    ),
    "14B": (
        {"layers": 2, **MHA8},
        """
        python tools/checkpoint/convert_ckpt.py --model-type GPT --loader llama2_hf --saver megatron
        --target-tensor-parallel-size 8 --make-vocab-size-divisible-by 16
        --load-dir ./model_from_hf/Qwen1.5-14B/ --save-dir ./model_weights/Qwen1.5-14B-v0.1-tp8-pp1/
        --tokenizer-model ./model_from_hf/Qwen1.5-14B/tokenizer.json --add-qkv-bias --params-dtype bf16""",
        Layout(8),
        256,
    ),
    "32B": (
        {"layers": 16, **GQA8},
        """
        python tools/checkpoint/convert_ckpt.py --model-type GPT --loader llama2_hf --saver megatron
        --target-tensor-parallel-size 8 --target-pipeline-parallel-size 4 --num-layers-per-virtual-pipeline-stage 2
        --params-dtype bf16 --load-dir ./model_from_hf/Qwen1.5-32B/
        --save-dir ./model_weights/Qwen1.5-32B-v0.1-tp8-pp4-vpp2/
        --tokenizer-model ./model_from_hf/Qwen1.5-32B/tokenizer.json --add-qkv-bias""",
        Layout(8, 4, 2),
        208,
    ),
    "72B": (
        {"layers": 32, **MHA8},
        """
        python tools/checkpoint/convert_ckpt.py --model-type GPT --loader llama2_hf --saver megatron
        --target-tensor-parallel-size 8 --target-pipeline-parallel-size 8 --num-layers-per-virtual-pipeline-stage 2
        --params-dtype bf16 --load-dir ./model_from_hf/Qwen1.5-72B/
        --save-dir ./model_weights/Qwen1.5-72B-v0.1-tp8-pp8-vpp2/
        --tokenizer-model ./model_from_hf/Qwen1.5-72B/tokenizer.json --add-qkv-bias""",
        Layout(8, 8, 2),
        208,
    ),
}
TO_HF = """
    python tools/checkpoint/convert_ckpt.py --model-type GPT --loader megatron --saver megatron
    --save-model-type {form} --load-dir {load} --target-tensor-parallel-size 1 --target-pipeline-parallel-size 1
    --add-qkv-bias {virtual} --save-dir {save}"""
RESHARD = """
    python tools/checkpoint/convert_ckpt.py --model-type GPT --loader megatron --saver megatron
    --target-tensor-parallel-size {tensor} --target-pipeline-parallel-size {pipeline} --load-dir {load}
    --save-dir {save} --add-qkv-bias"""


def words(command: str) -> list[str]:
    parts = shlex.split(command)
    assert parts[:2] == ["python", "tools/checkpoint/convert_ckpt.py"]
    return parts[2:]


def value_of(option: str, command: str) -> Path:
    parts = words(command)
    return Path(parts[parts.index(option) + 1])


@pytest.mark.parametrize("size", TO_MEGATRON)
def test_readme_commands_to_megatron_and_back(size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, command, layout, padded = TO_MEGATRON[size]
    monkeypatch.chdir(tmp_path)
    hf, mg = value_of("--load-dir", command), value_of("--save-dir", command)
    state = make_hf(hf, torch.bfloat16, **sizes)
    assert main(words(command)) == 0
    saved = open_megatron(mg)
    saved.check()
    assert (saved.layout, saved.padded_vocab_size, saved.dtype) == (layout, padded, torch.bfloat16)
    assert saved.args["tokenizer_model"].endswith("tokenizer.json")
    assert len(list(mg.glob("iter_0000001/mp_rank_*/model_optim_rng.pt"))) == layout.tensor * layout.pipeline
    assert sorted(path.name for path in (mg / "hf").iterdir()) == [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]

    reshard = RESHARD.format(tensor=2, pipeline=2, load=f"./{mg}/", save="./model_weights/resharded/")
    assert main(words(reshard)) == 0
    assert open_megatron(Path("model_weights/resharded")).layout == Layout(2, 2)

    for form, virtual in (("save_huggingface_llama", ""), ("save_huggingface_qwen", "")):
        if layout.chunks > 1:
            virtual = "--num-layers-per-virtual-pipeline-stage 2"
        back = TO_HF.format(form=form, load=f"./{mg}/", save=f"./{hf}/", virtual=virtual)
        assert main([*words(back), "--overwrite"]) == 0
        assert_same(state, load_hf(hf / "mg2hg"))
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (hf / "mg2hg" / name).read_bytes() == (hf / name).read_bytes()
    if size in ("0.5B", "32B"):
        loaded = Qwen2ForCausalLM.from_pretrained(hf / "mg2hg")
        assert loaded.dtype is torch.bfloat16
        assert torch.equal(
            loaded.state_dict()["model.layers.1.mlp.up_proj.weight"], state["model.layers.1.mlp.up_proj.weight"]
        )
        assert loaded.config.rope_parameters["rope_theta"] == 5000000.0


def test_the_tool_runs_as_a_script(tmp_path: Path) -> None:
    _, command, _, _ = TO_MEGATRON["4B"]
    hf = value_of("--load-dir", command)
    state = make_hf(tmp_path / hf, layers=4, heads=4, groups=4)
    done = subprocess.run([sys.executable, TOOL, *words(command)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bar where there is no terminal
    assert "TP1 PP2" in done.stdout and "wrote" in done.stdout
    back = TO_HF.format(form="save_huggingface_llama", load=value_of("--save-dir", command), save=hf, virtual="")
    done = subprocess.run(
        [sys.executable, TOOL, *words(back), "--progress"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "B/s" in done.stderr and "100%" in done.stderr
    assert_same(state, load_hf(tmp_path / hf / "mg2hg"))
    done = subprocess.run([sys.executable, TOOL, *words(back)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "--overwrite" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict, Path]:
    """A HF folder `hf` and its checkpoint `mg` in TP2 PP2 VPP2, in the current folder."""
    monkeypatch.chdir(tmp_path)
    state = make_hf(Path("hf"))
    assert (
        main(
            shlex.split(
                "--from hf --to megatron --load-dir hf --save-dir mg --target-tensor-parallel-size 2 "
                "--target-pipeline-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
            )
        )
        == 0
    )
    return state, tmp_path


def run(text: str) -> int:
    return run_command(main, shlex.split(text))


def test_to_hf_writes_save_dir_itself_and_config_comes_from_the_kept_copies(folders: tuple[dict, Path]) -> None:
    state, _ = folders
    assert run("--from megatron --to hf --load-dir mg --save-dir out") == 0
    assert_same(state, load_hf(Path("out")))
    assert not Path("out/mg2hg").exists()
    exported, original = (json.loads(Path(name, "config.json").read_text()) for name in ("out", "hf"))
    assert exported["rope_theta"] == exported["rope_parameters"]["rope_theta"] == 5000000.0
    assert exported["torch_dtype"] == exported["dtype"] == "bfloat16"
    assert {name: exported[name] for name in original} == original


def test_save_dir_without_config_takes_the_kept_copies_or_hf_config_dir(
    folders: tuple[dict, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    state, _ = folders
    base = "--loader megatron --save-model-type save_huggingface_llama --load-dir mg"
    assert run(f"{base} --save-dir elsewhere") == 0
    assert_same(state, load_hf(Path("elsewhere/mg2hg")))
    Path("mg/hf").rename("kept")
    assert run(f"{base} --save-dir third") == 2
    assert "--hf-config-dir" in capsys.readouterr().err
    assert not Path("third").exists()
    assert run(f"{base} --save-dir third --hf-config-dir kept") == 0
    assert_same(state, load_hf(Path("third/mg2hg")))
    assert Path("third/mg2hg/tokenizer.json").is_file()


def test_overwrite_replaces_what_was_written_and_nothing_else(folders: tuple[dict, Path]) -> None:
    _, _ = folders
    Path("mg/notes.txt").write_text("mine")
    other = make_hf(Path("hf2"), seed=5)
    again = "--from hf --load-dir hf2 --save-dir mg"
    assert run(again) == 2
    assert open_megatron(Path("mg")).layout == Layout(2, 2, 2)
    assert run(f"{again} --overwrite") == 0
    assert Path("mg/notes.txt").read_text() == "mine"
    assert open_megatron(Path("mg")).layout == Layout()
    assert sorted(path.name for path in Path("mg/iter_0000001").iterdir()) == ["modellink_manifest.json", "mp_rank_00"]
    assert run("--from megatron --to hf --load-dir mg --save-dir out") == 0
    assert_same(other, load_hf(Path("out")))
    Path("out/model-00001-of-00002.safetensors").write_bytes(b"an older export's shard")
    assert run("--from megatron --to hf --load-dir mg --save-dir out --overwrite") == 0
    assert_same(other, load_hf(Path("out")))
    assert not list(Path().glob(".*part"))


@pytest.mark.parametrize("name, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_params_dtype_casts_only_when_asked(folders: tuple[dict, Path], name: str, dtype: torch.dtype) -> None:
    state, _ = folders
    assert run(f"--from hf --load-dir hf --save-dir cast --params-dtype {name}") == 0
    saved = open_megatron(Path("cast"))
    assert saved.dtype is dtype and saved.args["params_dtype"] is dtype
    assert saved.args["bf16"] == (name == "bf16") and saved.args["fp16"] == (name == "fp16")
    assert run("--from megatron --to hf --load-dir cast --save-dir out") == 0
    assert_same({key: value.to(dtype) for key, value in state.items()}, load_hf(Path("out")))
    assert json.loads(Path("out/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_several_shards_get_an_index(folders: tuple[dict, Path]) -> None:
    state, _ = folders
    target = Path("sharded")
    target.mkdir()
    for _ in write_weights(target, hf_tensors(open_megatron(Path("mg")), open_hf(Path("hf")).model), shard_bytes=8000):
        pass
    assert_same(state, load_hf(target))
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    shards = sorted(target.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(path.stat().st_size < 8000 + 4096 for path in shards)
    (target / "config.json").write_text(Path("hf/config.json").read_text())
    loaded = Qwen2ForCausalLM.from_pretrained(target).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert run("--from hf --load-dir sharded --save-dir again") == 0
    assert run("--from megatron --to hf --load-dir again --save-dir out") == 0
    assert_same(state, load_hf(Path("out")))


def test_flags_without_effect_are_said_once_in_one_line(
    folders: tuple[dict, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run(
            "--from hf --load-dir hf --save-dir out --max-queue-size 50 --no-checking --megatron-path ./megatron "
            "--use-mcore-models --vocab-file vocab.json"
        )
        == 0
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if "without effect" in line]
    assert lines == [
        "without effect here: --max-queue-size, --no-checking, --megatron-path, --vocab-file, --use-mcore-models"
    ]


def test_what_the_source_says_may_be_repeated_but_not_contradicted(
    folders: tuple[dict, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base = "--from hf --load-dir hf --save-dir out"
    assert run(f"{base} --w-pack False --true-vocab-size 101 --add-qkv-bias") == 0
    for wrong, both in (
        ("--add-dense-bias", "True, but hf/config.json says False"),
        ("--embed-layernorm", "True, but hf/config.json says False"),
        ("--no-add-qkv-bias", "False, but hf/config.json says True"),
        ("--w-pack True", "True, but hf/config.json says False"),
        ("--true-vocab-size 99", "99, but hf/config.json says 101"),
    ):
        assert run(f"{base} --overwrite {wrong}") == 2
        assert both in capsys.readouterr().err
    assert run("--loader megatron --load-dir mg --save-dir out2 --no-add-qkv-bias") == 2
    assert "--add-qkv-bias is False" in capsys.readouterr().err


def test_reshard_keeps_the_source_sizes_that_are_not_asked(folders: tuple[dict, Path]) -> None:
    assert run("--loader megatron --load-dir mg --save-dir a --target-pipeline-parallel-size 4") == 0
    assert open_megatron(Path("a")).layout == Layout(2, 4)
    assert run("--loader megatron --load-dir mg --save-dir b --target-tensor-parallel-size 1") == 0
    assert open_megatron(Path("b")).layout == Layout(1, 2)
    assert Path("b/hf/config.json").is_file()


def test_every_flag_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for section in SECTIONS:
        for field in dataclasses.fields(section):
            assert len(field.metadata["help"]) > 5
            assert f"--{field.name.replace('_', '-')}" in text
