"""What docs/ and docstrings say of the benchmarks: commands parse, shapes fit, limits are those of the checks."""

import re
import shlex
import subprocess
from argparse import SUPPRESS

import pytest
from test_benchmarks import FOLDER, LOSS_LIMITS, OFFICIAL, PROGRAMS, REPO, SIZES, fits, train_step

from modellink.config.settings import parse_settings


def commands(text: str) -> list[tuple[str, str]]:
    """(program, rest of the command) of every benchmark command in a page or docstring."""
    code = [block.replace("\\\n", " ") for block in re.findall(r"`(python [^`]+)`", text)]
    lines = text.replace("\\\n", " ").splitlines()
    for number, line in enumerate(lines):
        if line.startswith("    python "):
            more = []  # a synopsis goes on below its first flag
            for following in lines[number + 1:]:
                if not re.match(r" {8,}[\[-]", following):
                    break
                more.append(following)
            code.append(" ".join([line, *more]))
    found = [re.match(r"\s*python benchmarks/(\w+\.py)\s*(.*)", block, flags=re.DOTALL) for block in code]
    return [(match[1], re.sub(r"\s+", " ", match[2])) for match in found if match]


PAGES = {str(path.relative_to(REPO)): path for path in [*(REPO / "docs").glob("*.md"), *FOLDER.glob("*.py")]}
COMMANDS = [(page, *command) for page, path in PAGES.items() for command in commands(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "program", "words"), [
    pytest.param(*command, id=" ".join(command)[:90]) for command in COMMANDS if command[1] in PROGRAMS])
def test_commands_of_the_documentation_parse(page: str, program: str, words: str) -> None:
    parser = PROGRAMS[program].make_parser()
    actions = parser._option_string_actions
    if "[" not in words:
        options = parser.parse_args(shlex.split(words))
        if "flags" in options:
            parse_settings("--flags", "", shlex.split(options.flags))
        return
    unquoted = re.sub(r'"[^"]*"', "", words)
    for flag, choices in re.findall(r"(--[a-z][a-z0-9-]*)(?: ([a-z0-9.]+(?:\|[a-z0-9.]+)+))?", unquoted):
        assert flag in actions and actions[flag].help != SUPPRESS, flag
        if choices and actions[flag].choices:
            assert list(actions[flag].choices) == choices.split("|"), flag


def test_every_benchmark_says_how_it_is_run() -> None:
    runnable = {path.name for path in FOLDER.glob("*.py") if "__main__" in path.read_text()}
    assert runnable == {*PROGRAMS, "convert.py"}
    assert {program for page, program, _ in COMMANDS if page == f"benchmarks/{program}"} == runnable
    assert [program for page, program, _ in COMMANDS if page == "docs/performance.md"].count("train_step.py") > 1
    for name, module in PROGRAMS.items():
        parser = module.make_parser()
        assert all(action.help for action in parser._actions) and name in parser.format_help()


def test_the_prose_of_the_performance_page() -> None:
    """Its flags exist, and its limits are those of the checks."""
    text = PAGES["docs/performance.md"].read_text(encoding="utf-8")
    said = re.search(r"within (\S+) in fp32, and in\s+bf16 within (\S+) in the first step and (\S+) after", text)
    assert said and [float(word) for word in said.groups()] == [LOSS_LIMITS["fp32"][1], *LOSS_LIMITS["bf16"]]
    ours = (REPO / "docs" / "flags.md").read_text(encoding="utf-8")
    known = {name for module in PROGRAMS.values() for name in module.make_parser()._option_string_actions}
    for flag in set(re.findall(r"`(--[a-z][a-z0-9-]*)", text)):
        assert flag in known or f"`{flag}`" in ours, flag


def loops(page: str) -> list[list[str]]:
    """The commands that each shell loop of a page runs."""
    found = []
    for block in re.findall(r"(?m)^    for .*(?:\n     .*)*\n    done$", PAGES[page].read_text(encoding="utf-8")):
        shell = subprocess.run(["bash", "-eu", "-c", 'python() { echo "$@"; }\n' + block], capture_output=True,
                               text=True)
        assert shell.returncode == 0, shell.stderr
        found.append(shell.stdout.splitlines())
    return found


def test_the_gpu_commands_fit_both_sides() -> None:
    """Layers and GB of the loops and the table are those of the estimates, for every shape and length."""
    page = PAGES["docs/performance.md"].read_text(encoding="utf-8")
    table = {(row[0], int(row[1])): [int(cell) for cell in row[2:]] for row in re.findall(
        r"(?m)^\| (\S+b) \| (\d+)" + r" \| (\d+)" * 6 + r" \|$", page)}
    assert list(table) == [(name, length) for name in SIZES for length in (4096, 8192)]
    limits = [int(found) for found in re.findall(r"layers for (\d+) GB", page)]
    assert limits == [int(found) for found in re.findall(r"a GPU of (\d+) GB", page)] == [80, 141]
    for column, (limit, lines) in enumerate(zip(limits, loops("docs/performance.md"), strict=True)):
        outputs = set()
        for (name, length), line in zip(table, lines, strict=True):
            program, *words = shlex.split(line)
            options = train_step.make_parser().parse_args(words)
            assert program == "benchmarks/train_step.py" and options.output not in outputs
            outputs.add(options.output)
            layers, ours, peer = table[name, length][3 * column:3 * column + 3]
            assert (options.shape, options.seq_length, options.layers) == (name, length, layers)
            assert (options.device, options.precision, options.micro_batch) == ("cuda", "bf16", 1)
            assert layers == fits.most_layers(name, length, limit * 1e9)
            config = train_step.shape(options)
            sizes = fits.our_bytes(config, length), fits.peer_bytes(config, length)
            assert [round(size / 1e9) for size in sizes] == [ours, peer] and max(sizes) <= limit * 1e9
            if layers < OFFICIAL[name][2]:  # and one layer more does not fit
                config["num_hidden_layers"] += 1
                assert max(fits.our_bytes(config, length), fits.peer_bytes(config, length)) > limit * 1e9
