"""The commands of README.md and README_zh.md: every script, flag, make target and linked page exists."""

import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_folders import make_hf

from modellink.checkpoint import convert_flags
from modellink.checkpoint.convert import main as convert
from modellink.checkpoint.layout import Layout
from modellink.checkpoint.megatron import open_megatron
from modellink.cli import VERBS
from modellink.config.parser import parse_sections
from modellink.config.settings import parse_settings
from modellink.data import preprocess
from modellink.data.show import ShowOptions
from modellink.doctor import DoctorOptions
from modellink.launch.options import parse_job
from modellink.models.presets.qwen15 import PRESETS

REPO = Path(__file__).parents[1]
PAGES = ("README.md", "README_zh.md", "docs/architecture.md", "docs/checkpoints.md", "docs/cuda.md",
         "docs/inference.md", "docs/performance.md")
ASSIGNMENT = re.compile(r"[A-Z_]+=")
# programs of others, whose flags are not ours to check
OUTSIDE = {"pip", "source", "hf", "python3"}


def blocks(page: str) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", (REPO / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    """Every command line, continuation lines joined."""
    joined = "\n".join(blocks(page)).replace("\\\n", " ")
    return [re.sub(r"\s+", " ", line).strip() for line in joined.splitlines()
            if line.strip() and not line.startswith("#")]


def split(command: str) -> tuple[dict[str, str], list[str]]:
    """(variables set before it or exported by it, words)."""
    words = shlex.split(command)
    variables = {}
    if words[0] == "export":
        words = words[1:]
    while words and ASSIGNMENT.match(words[0]):
        name, value = words.pop(0).split("=", 1)
        variables[name] = value
    return variables, words


def check_settings(words: list[str]) -> None:
    parse_settings("readme", "readme", words)


def check_sections(sections: tuple[type, ...]) -> Callable[[list[str]], None]:
    return lambda words: parse_sections("readme", "readme", sections, words) and None


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "tools/checkpoint/convert_ckpt.py": check_sections(convert_flags.SECTIONS),
    "tools/preprocess_data.py": check_sections((
        preprocess.InputOptions, preprocess.InstructionOptions, preprocess.TokenizerOptions, preprocess.OutputOptions,
        preprocess.FormerOptions)),
    "pretrain_gpt.py": check_settings,
    "posttrain_gpt.py": check_settings,
    "inference.py": check_settings,
    "evaluation.py": check_settings,
}


def check_verb(words: list[str]) -> None:
    assert words[0] in VERBS
    if words[0] == "doctor":
        check_sections((DoctorOptions,))(words[1:])
        return
    if words[:2] == ["checkpoint", "show"]:
        assert len(words) == 3
        return
    if words[0] == "data":
        assert words[1] == "show"
        check_sections((ShowOptions,))(words[3:])
        return
    if words[0] == "eval":
        check_settings(words[1:])
        return
    job = parse_job(words[1:])
    assert (REPO / job.script).is_file()
    PROGRAMS[job.script](list(job.arguments))


def check_script(words: list[str]) -> str:
    """An example script; returns its text."""
    path = REPO / words[0]
    assert path.parent.name == "qwen15" and path.is_file(), words[0]
    check_settings([word for word in words[1:] if word != "--check"])
    return path.read_text() + (path.parent / "common.sh").read_text()


@pytest.mark.parametrize("command", [*commands("README.md"), *commands("docs/checkpoints.md")])
def test_every_command_names_what_exists(command: str) -> None:
    variables, words = split(command)
    if not words or words[0] in OUTSIDE:
        return
    program, *rest = words
    if program == "make":
        for target in rest:
            assert re.search(rf"^{target}:", (REPO / "Makefile").read_text(), flags=re.MULTILINE), target
    elif program == "modellink":
        check_verb(rest)
    elif program == "python":
        assert (REPO / rest[0]).is_file()
        PROGRAMS[rest[0]](rest[1:])
    elif program == "bash":
        text = check_script(rest)
        for name in variables:
            assert re.search(rf"\$\{{?{name}\b|need {name}\b", text), f"{rest[0]} does not read {name}"
    else:
        raise AssertionError(f"{program}: add it to OUTSIDE or check it here")


def test_both_languages_have_the_same_commands() -> None:
    assert blocks("README.md") == blocks("README_zh.md")
    assert blocks("README.md")[0] == "make quickstart\nmake test\n"


@pytest.mark.parametrize("page", ["README.md", "README_zh.md", "docs/npu.md", "docs/cuda.md"])
def test_what_an_owner_of_a_device_installs(page: str) -> None:
    """The clone, since the package is on no index; for an NPU the release that is pinned, with its CANN."""
    text = (REPO / page).read_text(encoding="utf-8")
    assert "install 'modellink[" not in text and re.search(r"pip install -e ['\"]\.\[", text)
    pinned = re.search(r'"torch-npu==([\d.]+)"', (REPO / "setup.py").read_text())
    if page != "docs/cuda.md":
        assert pinned is not None and f"torch-npu {pinned[1]}" in text
        assert all(words in text for words in ("CANN 9.1.0", "2.12.0", "CANN 8.x"))


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_named_exist(page: str) -> None:
    text = (REPO / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (REPO / page).parent.joinpath(target).exists(), target
    for name in re.findall(r"`((?:modellink|tests|docs|tools)/[\w/]+\.(?:py|md|sh))`", text):
        assert (REPO / name).is_file(), name


@pytest.mark.parametrize("page", ["README.md", "README_zh.md", "docs/inference.md"])
def test_flags_and_variables_in_the_prose_exist(page: str) -> None:
    prose = re.sub(r"```.*?```", "", (REPO / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    names = (REPO / "docs" / "flags.md").read_text() + "".join(path.read_text() for path in (
        REPO / "modellink/checkpoint/convert_flags.py", REPO / "modellink/data/preprocess_flags.py",
        REPO / "examples/qwen15/common.sh"))
    for flag in set(re.findall(r"`(--[a-z][a-z0-9-]*)", prose)) - {"--help", "--use-fused-"}:
        switch = f"`--{flag.removeprefix('--no-')}`"
        assert flag in names or flag[2:].replace("-", "_") in names or switch in names, flag
    script = "".join(path.read_text() for path in sorted((REPO / "examples/qwen15").glob("*.sh")))
    for variable in set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", prose)):
        assert variable in script, variable


def test_the_table_of_sizes_is_the_scripts() -> None:
    rows = re.findall(r"^\| ([\d.]+B) \| (\d) x (\d) \| (\d) \| (\d) \| (\S) \| (\d) \| (\d) / (\d+) \|$",
                      (REPO / "README.md").read_text(), flags=re.MULTILINE)
    assert {f"qwen15-{row[0].lower()}" for row in rows} == set(PRESETS)
    for size, nodes, devices, tensor, pipeline, chunk, data, micro, batch in rows:
        text = (REPO / f"examples/qwen15/pretrain_qwen15_{size.lower().replace('.', 'point')}_ptd.sh").read_text()
        for name, value in (("NNODES", nodes), ("NPUS_PER_NODE", devices), ("TP", tensor), ("PP", pipeline),
                            ("VPP", "" if chunk == "-" else chunk), ("MBS", micro), ("GBS", batch)):
            assert re.search(rf"^{name}=\${{{name}:?-{value}}}", text, flags=re.MULTILINE), (size, name)
        assert int(nodes) * int(devices) == int(tensor) * int(pipeline) * int(data)


def conversions() -> Iterator[tuple[str, list[str]]]:
    for command in commands("README.md"):
        _, words = split(command)
        if words[1:2] == ["tools/checkpoint/convert_ckpt.py"]:
            source = words[words.index("--load-dir") + 1]
            yield " ".join([source, "to", words[words.index("--save-dir") + 1]]), words[2:]


def test_the_conversions_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in [words for _, words in conversions() if "llama2_hf" in words]:
        name = words[words.index("--load-dir") + 1]
        size = Path(name).name.removeprefix("Qwen1.5-").lower()
        preset = PRESETS[f"qwen15-{size}"]
        heads, groups = preset.num_attention_heads, preset.num_query_groups
        make_hf(Path(name), torch.bfloat16, layers=preset.num_layers, heads=heads, groups=groups, hidden=heads * 2,
                ffn=16, vocab=203, tie=preset.tie_word_embeddings)
    layouts = {}
    for title, words in conversions():
        target = Path(words[words.index("--save-dir") + 1])
        if words[words.index("--load-dir") + 1].startswith("./ckpt/"):  # a trained checkpoint
            os.makedirs("ckpt", exist_ok=True)
            Path("model_weights/Qwen1.5-7B-tp8-pp1").rename("ckpt/Qwen1.5-7B")
        assert convert(words) == 0, title
        if target.is_relative_to("model_weights"):
            layouts[target.name] = open_megatron(target).layout
    assert (Path("model_from_hf/Qwen1.5-7B/mg2hg") / "config.json").is_file()
    for name, layout in layouts.items():
        tensor, pipeline, chunk = re.fullmatch(r"Qwen1\.5-[\d.]+B-tp(\d)-pp(\d)(-vpp2)?", name).groups()  # type: ignore[union-attr]
        layers = PRESETS[f"qwen15-{name.split('-')[1].lower()}"].num_layers
        chunks = layers // (int(pipeline) * 2) if chunk else 1
        assert layout == Layout(int(tensor), int(pipeline), chunks), name
