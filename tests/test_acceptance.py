"""tools/npu_acceptance.py on the CPU: what breaks is a row of the report, and nothing else is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ladder import REPO
from tiny import tiny_config


def acceptance(folder: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, report, table."""
    done = subprocess.run([sys.executable, "tools/npu_acceptance.py", "--device", "cpu", "--out", str(folder), *words],
                          cwd=REPO, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (folder / "acceptance.json").is_file(), done.stdout[-3000:] + done.stderr[-6000:]
    return done.returncode, json.loads((folder / "acceptance.json").read_text()), done.stdout


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str]:
    base = tmp_path_factory.mktemp("broken")
    tiny_config(num_hidden_layers=1).save_pretrained(base / "model")
    runner = Path(__file__).with_name("breaking_runner.py")
    return acceptance(base / "out", "--runner", str(runner), "--ranks", "2", "--megabytes", "1", "--model",
                      str(base / "model"), "--seq-length", "32", "--steps", "2", "--curves", "fp32")


def rows_of(report: dict[str, Any], part: str) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if row["part"] == part]


def test_a_kernel_that_refuses_does_not_take_the_others_with_it(broken: tuple[int, dict[str, Any], str]) -> None:
    code, report, table = broken
    rows = rows_of(report, "operators")
    failed = [row for row in rows if row["verdict"] == "FAILED"]
    assert code == 1 and len(rows) == 69 and len(failed) == 36
    assert all(row["case"].startswith("cached_attention") for row in failed)
    assert {row["verdict"] for row in rows if row not in failed} == {"pass"}
    for row in failed:
        failure = row["failure"]
        assert (failure["exception"], failure["message"]) == ("RuntimeError", "no kernel\nfor these shapes")
        assert "in refuse" in failure["traceback"]
        assert row["case"].endswith(": RuntimeError: no kernel")
    assert all(row["failure"] is None for row in rows if row not in failed)


def test_a_device_that_is_lost_in_a_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing works on it any more: one row says so, and no other case is blamed."""
    monkeypatch.setenv("BREAKING_RUNNER", "lose the device")
    runner = Path(__file__).with_name("breaking_runner.py")
    code, report, _ = acceptance(tmp_path, "--part", "operators", "--runner", str(runner))
    *rows, refused, rest = report["rows"]
    assert code == 1 and rows and {row["verdict"] for row in rows} == {"pass"}
    name = "cached_attention BNSD 8 groups, 1 new fp32"
    assert refused["case"].startswith(f"{name}: ") and refused["failure"]["message"] == "vector core exception"
    assert rest["case"] == f"the rest of the part, device lost after {name}: RuntimeError: error code is 507015"
    assert "in device_failure" in rest["failure"]["traceback"]


def test_collectives_where_no_form_of_mc2_is(tmp_path: Path) -> None:
    code, report, table = acceptance(tmp_path, "--part", "collectives", "--ranks", "2", "--megabytes", "1")
    assert code == 0, table
    assert [row["verdict"] for row in report["rows"]] == ["pass", "-"] * 5 + ["-"] * 4
    assert [row["case"] for row in report["rows"]][-4:] == [
        f"{kind}_linear {precision}: left out, no such form on this device"
        for precision in ("bf16", "fp16") for kind in ("column", "row")]


def test_a_rank_that_a_signal_ends(broken: tuple[int, dict[str, Any], str]) -> None:
    (row,) = rows_of(broken[1], "collectives")
    assert row["verdict"] == "FAILED" and row["case"].startswith("the whole part: killed by SIGSEGV: Fatal Python")
    assert row["failure"]["exception"] == "killed by SIGSEGV"
    assert "breaking_runner.py" in row["failure"]["message"]  # where it was
    assert row["failure"]["log"].endswith("collectives.ranks/rank_1.log")


def test_trainings_that_raise_or_take_no_step(broken: tuple[int, dict[str, Any], str]) -> None:
    _, report, table = broken
    for part, name, expected in (("curve", "curve-fp32-cpu", ("exit code 0", "after 0 of 2 steps")),
                                 ("speed", "speed", ("RuntimeError", "out of memory: 2 GiB\nare missing"))):
        (row,) = rows_of(report, part)
        failure = row["failure"]
        assert row["verdict"] == "FAILED" and (failure["exception"], failure["message"]) == expected
        assert failure["log"].endswith(f"/{name}.log")
        # the whole chain
        assert (failure["traceback"].startswith("Traceback") and "KeyError: 'step'" in failure["traceback"]
                and failure["traceback"].endswith("are missing")) == (part == "speed")
    failed = [line.split()[0] for line in table.splitlines() if line.endswith("FAILED")]
    assert failed == ["operators"] * 36 + ["collectives", "curve", "generation", "speed"]


def test_generation_that_is_right_refused_and_wrong(broken: tuple[int, dict[str, Any], str]) -> None:
    """In fp32, bf16 and fp16: each precision has rows of its own."""
    rows = rows_of(broken[1], "generation")
    logits = ["prompts of 37, 5, 81, ", "11 words behind a prompt of 37, ", "8 steps of rows of different lengths, "]
    assert [(row["case"], row["verdict"]) for row in rows] == [
        *((f"{case}fp32", "pass") for case in (*logits, "greedy answers, ")),
        ("bf16: RuntimeError: no kernel", "FAILED"),
        *((f"{case}fp16", "FAIL") for case in logits), ("greedy answers, fp16", "-")]
    assert "in attend_badly" in rows[4]["failure"]["traceback"]
    assert rows[3]["value"] == 0 < rows[-1]["value"]


def test_a_part_that_raises_anything(tmp_path: Path) -> None:
    """In the tool's own code: here it meets a folder where it writes a file."""
    (tmp_path / "speed.jsonl").mkdir()
    code, report, table = acceptance(tmp_path, "--part", "speed", "--seq-length", "32", "--steps", "2")
    (row,) = report["rows"]
    assert code == 1 and row["verdict"] == "FAILED" and "speed.jsonl" in row["failure"]["message"]
    assert row["case"].startswith("the whole part: IsADirectoryError: ")
    assert row["failure"]["exception"] == "IsADirectoryError" and "in train\n" in row["failure"]["traceback"]
    assert table.splitlines()[-1].endswith("FAILED")


def test_curves_that_are_left_out_are_rows(tmp_path: Path) -> None:
    """They need more devices than there are: they are said, nothing is trained, and nothing has failed."""
    code, report, table = acceptance(tmp_path, "--ranks", "1", "--part", "curve", "--curves", "bf16-pp2", "bf16-tp2-sp")
    assert code == 0
    assert [(row["case"], row["verdict"], row["value"]) for row in report["rows"]] == [
        ("bf16-pp2: left out, it needs 2 devices", "-", None), ("bf16-tp2-sp: left out, it needs 2 devices", "-", None)]
    assert all(f"{name}: left out, it needs 2 devices" in table for name in ("bf16-pp2", "bf16-tp2-sp"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acceptance.json"]
