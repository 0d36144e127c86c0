"""--profile: traces of the steps and ranks asked for, whole, and a training that does not notice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ladder import REPO, read_metrics, run_cases
from test_training_instruction import write_streams
from tiny import tiny_config

from modellink.config import ConfigError
from modellink.config.settings import ProfileSettings, parse_settings
from modellink.device.select import select_device
from modellink.runtime import prepare_run
from modellink.training.profiling import StepProfiler

BASE = ["--mock-data", "--seq-length", "32", "--train-iters", "4", "--micro-batch-size", "2", "--global-batch-size",
        "4", "--lr", "1e-3", "--eval-iters", "0", "--device", "cpu"]
TP2 = ["--tensor-model-parallel-size", "2"]
RANGE = ["--profile", "--profile-step-start", "1", "--profile-step-end", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("profile")
    tiny_config().save_pretrained(base / "model")

    def case(name: str, *more: str) -> list[str]:
        return ["--model", str(base / "model"), *BASE, "--metrics-file", str(base / f"{name}.jsonl"), *more]

    def traced(name: str, *more: str) -> list[str]:
        return case(name, "--profile-dir", str(base / name), *more)

    run_cases([
        case("plain", *TP2), traced("second", *TP2, *RANGE, "--profile-ranks", "1"),
        traced("stopped", *TP2, *RANGE, "--exit-interval", "2"),
        case("data"), traced("both", *RANGE, "--profile-ranks", "0", "1"),
    ], 2, base)
    return base


def trace(path: Path) -> set[str]:
    """Names of what a trace recorded."""
    return {event["name"] for event in json.loads(path.read_text())["traceEvents"] if "name" in event}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_trace_holds_the_steps_and_ranks_asked_for(folder: Path) -> None:
    assert files(folder / "second") == ["rank_1.steps_2-3.json"]
    names = trace(folder / "second" / "rank_1.steps_2-3.json")
    assert {name for name in names if name.startswith("step ")} == {"step 2", "step 3"}
    assert files(folder / "both") == ["rank_0.steps_2-3.json", "rank_1.steps_2-3.json"]


def test_a_trace_shows_operations_of_forward_backward_communication_and_optimizer(folder: Path) -> None:
    names = trace(folder / "second" / "rank_1.steps_2-3.json")
    assert {"_TiledAttention", "_TiledAttentionBackward", "aten::rms_norm", "aten::_fused_adamw_"} <= names
    assert any("allreduce" in name or "all_reduce" in name for name in names)
    assert any(name.startswith("autograd::engine::evaluate_function") for name in names)


def test_a_tuning_is_recorded_too(folder: Path) -> None:
    """The program itself, on instruction samples: the second and third of three steps."""
    write_streams(folder / "samples", count=20)
    words = ["--stage", "sft", "--model", str(folder / "model"), "--data-path", str(folder / "samples"), "--split",
             "100,0,0", "--seq-length", "32", "--train-iters", "3", "--global-batch-size", "2", "--lr", "1e-3",
             "--eval-iters", "0", "--device", "cpu", "--profile-dir", str(folder / "tuned"), *RANGE]
    done = subprocess.run([sys.executable, "posttrain_gpt.py", *words], cwd=REPO, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert files(folder / "tuned") == ["rank_0.steps_2-3.json"]
    assert f"wrote the trace of steps 2 to 3 of rank 0 to {folder / 'tuned'}" in done.stdout
    names = trace(folder / "tuned" / "rank_0.steps_2-3.json")
    backward = "autograd::engine::evaluate_function: _TiledAttentionBackward"
    assert {"step 2", "step 3", "_TiledAttention", backward, "aten::_fused_adamw_"} <= names and "step 1" not in names


def test_a_run_that_ends_within_the_range_writes_what_it_has(folder: Path) -> None:
    assert files(folder / "stopped") == ["rank_0.steps_2-2.json"]
    steps = {name for name in trace(folder / "stopped" / "rank_0.steps_2-2.json") if name.startswith("step ")}
    assert steps == {"step 2"}


@pytest.mark.parametrize("plain, traced", [("plain", "second"), ("data", "both")])
def test_training_is_the_same_bit_for_bit(plain: str, traced: str, folder: Path) -> None:
    expected, found = read_metrics(folder / f"{plain}.jsonl"), read_metrics(folder / f"{traced}.jsonl")
    assert len(found) == 4
    for name in ("loss", "grad_norm", "lr", "tokens"):
        assert [record[name] for record in found] == [record[name] for record in expected]


def test_a_line_says_where_and_when_nothing_was_recorded(folder: Path, tmp_path: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    settings = ProfileSettings(profile=True, profile_step_start=4, profile_step_end=5, profile_dir=str(tmp_path))
    late = StepProfiler(settings, select_device("cpu"), 0)
    for number in (6, 7):  # a run that was resumed behind the range
        with late.step(number):
            pass
    late.close()
    assert capsys.readouterr().out == "--profile recorded nothing: the run took no step from 5 to 5\n"
    there = StepProfiler(settings, select_device("cpu"), 0)
    with there.step(5):
        pass
    there.close()
    assert capsys.readouterr().out == (f"wrote the trace of steps 5 to 5 of rank 0 to {tmp_path}/"
                                       "rank_0.steps_5-5.json\n")
    other = StepProfiler(settings, select_device("cpu"), 1)
    with other.step(5):
        pass
    other.close()
    assert capsys.readouterr().out == "" and files(tmp_path) == ["rank_0.steps_5-5.json"]


def test_a_step_that_fails_leaves_no_trace_behind(tmp_path: Path) -> None:
    settings = ProfileSettings(profile=True, profile_step_start=0, profile_step_end=2, profile_dir=str(tmp_path / "p"))
    with pytest.raises(ZeroDivisionError), StepProfiler(settings, select_device("cpu"), 0).step(1):
        1 / 0  # noqa: B018
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("words, said", [
    ("--profile --profile-step-start 3 --profile-step-end 3", "--profile-step-end 3: is not above "),
    ("--profile --profile-step-start -1", "--profile-step-start -1: must be at least 0"),
    ("--profile", "--profile-step-start 10: is beyond the last step to record, --train-iters 4"),
    ("--profile --profile-step-start 3 --profile-step-end 5", "--profile-step-end 5: is beyond the last step"),
    ("--profile --profile-step-start 0 --profile-step-end 1 --profile-ranks 0 2 3",
     "--profile-ranks 2 3: the job has the ranks 0 to 1; choose"),
    ("--profile-step-start 3", "--profile-step-start without --profile: nothing would be recorded")])
def test_wrong_ranges_are_found_before_anything_starts(words: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        prepare_run(parse_settings("t", "t", ["--model", "qwen15-0.5b", *BASE, *words.split()]), 2, "train")
    (sentence,) = error.value.problems
    assert sentence.startswith(said)


def test_both_programs_of_training_take_the_flags() -> None:
    import posttrain_gpt
    import pretrain_gpt

    words = ["--model", "qwen15-0.5b", *BASE, "--profile", "--profile-step-start", "3", "--profile-step-end", "3"]
    for main, more in ((pretrain_gpt.main, []), (posttrain_gpt.main, ["--stage", "sft"])):
        with pytest.raises(ConfigError) as error:
            main([*words, *more])
        assert any("--profile-step-end 3: is not above" in sentence for sentence in error.value.problems)


def test_the_flags_are_those_of_training() -> None:
    words = ["--profile", "--no-use-deter-comp", "--load", "nowhere"]
    with pytest.raises(ConfigError) as error:
        prepare_run(parse_settings("t", "t", words), 1, "generate")
    assert "--profile: is for pretrain_gpt.py; leave it out." in error.value.problems
    assert "--no-use-deter-comp: is for pretrain_gpt.py; leave it out." in error.value.problems
