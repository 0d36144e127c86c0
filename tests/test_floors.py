"""The floors of docs/architecture.md, read from the imports of the code."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from modellink.patches.ledger import ALL_DEVICES, LEDGER

REPO = Path(__file__).parents[1]
PACKAGE = REPO / "modellink"
# bottom to top; a room imports rooms of lower floors, and on its own floor the rooms to its left
FLOORS: tuple[tuple[str, ...], ...] = (
    ("config", "device"),
    ("ops", "patches", "parallel"),
    ("lora", "models", "data"),
    ("checkpoint", "training", "inference"),
    ("checks", "planner", "runtime", "start", "api", "evaluation", "launch", "doctor", "quickstart", "demo_sft", "cli"),
)
ORDER = [room for floor in FLOORS for room in floor]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
ACCELERATOR = re.compile(r"\btorch\.cuda\b|\btorch\.npu\b|\btorch_npu\b|\bnccl\b|\bhccl\b")
# parser choices, and the words of their help
MAY_NAME_BACKENDS = {"config/settings.py"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[str]:
    """Dotted names of every module a file imports anywhere, also inside functions and under TYPE_CHECKING."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def violation(room: str, other: str) -> bool:
    """Whether `room` must not import `other`."""
    if room == other:
        return False
    floors = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    if floors[room] != floors[other]:
        return floors[other] > floors[room]
    return ORDER.index(other) > ORDER.index(room)


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in FILES} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    room = room_of(path)
    others = {name.split(".")[1] for name in imported(path) if name.startswith("modellink.") and name.count(".")}
    others -= {"__version__"}
    wrong = sorted(other for other in others if violation(room, other))
    assert not wrong, f"{path.relative_to(REPO)} is in {room} and imports {', '.join(wrong)}"


def test_the_rule_itself_would_notice() -> None:
    assert violation("config", "device") and violation("models", "training") and violation("checks", "runtime")
    assert not violation("device", "config") and not violation("training", "checkpoint")


def test_no_room_imports_a_top_level_script() -> None:
    scripts = {"pretrain_gpt", "inference", "evaluation", "tools", "benchmarks"}
    for path in FILES:
        assert not scripts & {name.split(".")[0] for name in imported(path)}, path


@pytest.mark.parametrize("folder", ["checkpoint", "models/presets", "config", "checks", "planner", "data"])
def test_conversion_checks_and_plans_import_no_megatron(folder: str) -> None:
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        assert not [name for name in imported(path) if name.split(".")[0] == "megatron"], path


def modules_after(statement: str) -> set[str]:
    """Top-level modules that are loaded after a statement in a fresh process."""
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_converter_loads_no_megatron() -> None:
    loaded = modules_after("import modellink.checkpoint.convert, modellink.models.presets.qwen15")
    assert "torch" in loaded and "megatron" not in loaded


def test_importing_the_package_loads_no_torch() -> None:
    for statement in ("import modellink", "import modellink.config.settings", "import modellink.cli, modellink.doctor",
                      "import modellink.quickstart.__main__", "import modellink.demo_sft.__main__",
                      "import pretrain_gpt", "import inference", "import evaluation", "import modellink.api",
                      "from modellink import load"):
        assert not {"torch", "megatron", "transformers"} & modules_after(statement), statement


def code_without_documentation(path: Path) -> str:
    """The code of a file without comments and documentation strings; other strings stay."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [line for line in body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def test_only_device_and_ops_name_accelerators() -> None:
    scripts = [REPO / "pretrain_gpt.py", REPO / "inference.py", REPO / "evaluation.py", *(REPO / "tools").rglob("*.py")]
    for path in [*FILES, *scripts]:
        name = str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else path.name
        if path in FILES and room_of(path) in ("device", "ops") or name in MAY_NAME_BACKENDS:
            continue
        found = ACCELERATOR.search(code_without_documentation(path))
        assert found is None, f"{name} names {found.group() if found else ''}"


def test_the_architecture_page_shows_these_floors() -> None:
    page = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (.+?) \|", page, flags=re.MULTILINE)
    shown: dict[int, list[str]] = {}
    for floor, room in rows:
        shown.setdefault(int(floor), []).extend(re.findall(r"`modellink/(\w+?)(?:\.py|/)`", room))
    assert [tuple(shown[number]) for number in range(len(FLOORS))] == list(FLOORS)


def test_git_ignores_no_file_of_the_package() -> None:
    if not (REPO / ".git").exists():
        pytest.skip("not a git clone")
    names = "\n".join(str(path.relative_to(REPO)) for path in [*FILES, *(REPO / "tests").glob("*.py")])
    done = subprocess.run(["git", "check-ignore", "--no-index", "--stdin"], cwd=REPO, input=names, capture_output=True,
                          text=True)
    assert done.stdout == "", f".gitignore hides {done.stdout}"


def test_the_ledger_of_the_page_is_that_of_the_code() -> None:
    page = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.partition("## The ledger")[2].partition("\n## ")[0]
    told = dict(re.findall(r"(?m)^\| `([\w-]+)` \| ([\w, ]+) \|", section))
    assert told == {patch.name: "all" if patch.devices == ALL_DEVICES else ", ".join(patch.devices) for patch in LEDGER}
