"""Whole jobs through the launcher: stopping, evaluating, resharding, separate disks, and mistakes met while running."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ladder import REPO, read_metrics, run_cases
from tiny import TINY, save_tiny, tiny_config

from modellink.data.indexed import IndexedWriter
from modellink.device.report import package_lines
from modellink.launch.ranks import free_port

LAUNCH = [sys.executable, "-m", "modellink.cli", "launch"]
COMMON = ["--seq-length", "32", "--micro-batch-size", "2", "--global-batch-size", "8", "--lr", "1e-3",
          "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("flow")
    tiny_config(**TINY).save_pretrained(base / "model")
    write_data(base / "data")
    return base


def write_data(prefix: Path, top: int = TINY["vocab_size"]) -> None:
    generator = np.random.default_rng(3)
    with IndexedWriter(prefix) as writer:
        lengths = generator.integers(5, 90, 80)
        writer.append(generator.integers(top - 1003 if top > 1003 else 0, top, lengths.sum()), lengths)


def environment() -> dict[str, str]:
    return dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(REPO))


def launch(folder: Path, ranks: int, arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run([*LAUNCH, "--nproc-per-node", str(ranks), "--log-dir", str(folder / "logs"),
                           str(REPO / "pretrain_gpt.py"), *arguments], env=environment(), capture_output=True,
                          text=True, timeout=300)


def mock(folder: Path, steps: int, *more: str) -> list[str]:
    return ["--model", str(folder / "model"), "--mock-data", "--train-iters", str(steps), "--eval-iters", "0",
            *COMMON, *more]


def test_sigterm_saves_and_the_run_continues(folder: Path) -> None:
    save = folder / "sigterm"
    arguments = mock(folder, 2000, "--save", str(save), "--tensor-model-parallel-size", "2")
    job = subprocess.Popen([*LAUNCH, "--nproc-per-node", "2", "--log-dir", str(folder / "sigterm-logs"),
                            str(REPO / "pretrain_gpt.py"), *arguments], env=environment(), text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = save / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (lines.exists() and len(lines.read_text().splitlines()) >= 3):
        time.sleep(0.2)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=90)
    saved = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert f"stopped after step {saved}: SIGTERM" in output
    assert len(read_metrics(lines)) == saved
    more = mock(folder, saved + 1, "--save", str(save), "--load", str(save), "--tensor-model-parallel-size", "2",
                "--override-opt-param-scheduler")
    done = launch(folder, 2, more)
    assert done.returncode == 0, done.stderr
    assert f"resumed {save} at step {saved} with optimizer state" in done.stdout
    assert [record["step"] for record in read_metrics(lines)] == list(range(1, saved + 2))


def test_evaluation_and_exits(folder: Path) -> None:
    """Validation every interval, the test set at the end, and the two ways of stopping early."""
    data = ["--model", str(folder / "model"), "--data-path", str(folder / "data"), "--split", "80,10,10", *COMMON,
            "--data-cache-path", str(folder / "cache")]
    run_cases([
        [*data, "--train-iters", "4", "--eval-interval", "2", "--eval-iters", "2",
         "--metrics-file", str(folder / "eval.jsonl")],
        [*data, "--train-iters", "9", "--exit-interval", "3", "--eval-iters", "0",
         "--metrics-file", str(folder / "exit.jsonl")],
        [*data, "--train-iters", "9", "--exit-duration-in-mins", "1e-9", "--eval-iters", "0",
         "--metrics-file", str(folder / "late.jsonl")],
        [*data, "--train-iters", "2", "--eval-iters", "2", "--eval-interval", "1", "--split", "100,0,0",
         "--metrics-file", str(folder / "train-only.jsonl")],
    ], 1, folder)
    records = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    assert [(record["kind"], record["step"]) for record in records] == [
        ("train", 1), ("train", 2), ("validation", 2), ("train", 3), ("train", 4), ("validation", 4), ("test", 4)]
    assert all(6 < record["loss"] < 8 for record in records)
    assert len({record["loss"] for record in records}) == len(records)
    assert len(read_metrics(folder / "exit.jsonl")) == 3
    assert len(read_metrics(folder / "late.jsonl")) == 1
    assert {json.loads(line)["kind"] for line in (folder / "train-only.jsonl").read_text().splitlines()} == {"train"}


def test_weights_of_any_layout_load_into_any_other(folder: Path) -> None:
    """Saved at TP2 PP2 VPP2 by training; the same loss in one process, at TP2, and in transformers after export."""
    from transformers import Qwen2ForCausalLM

    from modellink.checkpoint.convert import main as convert
    from modellink.data.mock import MockDataset

    saved = folder / "wide"
    run_cases([mock(folder, 3, "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2",
                    "--num-layers-per-virtual-pipeline-stage", "1", "--sequence-parallel", "--save", str(saved))],
              4, folder)
    again = mock(folder, 1, "--load", str(saved), "--finetune", "--seed", "9")
    run_cases([[*again, "--metrics-file", str(folder / "again1.jsonl")]], 1, folder)
    run_cases([[*again, "--metrics-file", str(folder / "again2.jsonl"), "--tensor-model-parallel-size", "2"]],
              2, folder)
    out = folder / "out"
    assert convert(["--from", "megatron", "--to", "hf", "--load-dir", str(saved), "--save-dir", str(out)]) == 0
    model = Qwen2ForCausalLM.from_pretrained(out, dtype=torch.float32)
    data = MockDataset(TINY["vocab_size"], 32, 8, 9)
    tokens = torch.stack([torch.as_tensor(data[i]["tokens"]) for i in range(8)])
    labels = torch.stack([torch.as_tensor(data[i]["labels"]) for i in range(8)])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten()).item()
    for name in ("again1", "again2"):
        (record,) = read_metrics(folder / f"{name}.jsonl")
        assert record["step"] == 1
        assert record["loss"] == pytest.approx(expected, abs=1e-5)


def test_a_checkpoint_without_optimizer_state_starts_at_step_0(folder: Path) -> None:
    saved = folder / "weights-only"
    run_cases([mock(folder, 2, "--save", str(saved), "--no-save-optim")], 1, folder)
    done = launch(folder, 1, mock(folder, 2, "--load", str(saved)))
    assert done.returncode == 0, done.stderr
    assert "starting at step 0 without optimizer state" in done.stdout
    assert "step 1/2" in done.stdout
    # the log opens with the lines of modellink doctor: versions, device and the form of every operation
    versions, lines = package_lines(), done.stdout.splitlines()
    assert f"torch           {torch.__version__}" in versions
    assert lines[:len(versions)] == versions
    assert re.fullmatch(r"chosen: cpu, cpu \([\d.]+ GiB free\)", lines[len(versions)])
    assert lines[len(versions) + 1:len(versions) + 4] == [
        f"  torch: {torch.__version__}", "  threads: 1", "operations for float32 and heads of 16 on cpu:"]
    assert done.stdout.count("heads of 16 on cpu:\n  rms_norm: parts of rows in the cache") == 1


def test_two_nodes_with_separate_disks(folder: Path, tmp_path: Path) -> None:
    """Each node has its own copy of the data and its own cache; neither sees the other's."""
    port = free_port()
    jobs = []
    for node in range(2):
        disk = tmp_path / f"node{node}"
        disk.mkdir()
        write_data(disk / "data")
        arguments = ["--model", str(folder / "model"), "--data-path", "data", "--split", "100,0,0",
                     "--train-iters", "3", "--eval-iters", "0", *COMMON, "--no-shared-storage",
                     "--data-cache-path", "cache", "--metrics-file", "metrics.jsonl"]
        jobs.append(subprocess.Popen(
            [*LAUNCH, "--nproc-per-node", "1", "--nnodes", "2", "--node-rank", str(node), "--master-addr", "127.0.0.1",
             "--master-port", str(port), str(REPO / "pretrain_gpt.py"), *arguments], cwd=disk, env=environment(),
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    outputs = [job.communicate(timeout=240)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert len(read_metrics(tmp_path / "node0" / "metrics.jsonl")) == 3
    caches = [sorted(path.name for path in (tmp_path / f"node{node}" / "cache").rglob("*")) for node in range(2)]
    assert caches[0] and caches[0] == caches[1]


def wrong(folder: Path, ranks: int, arguments: list[str], *words: str) -> str:
    """A job that must end with one sentence and exit code 2."""
    done = launch(folder, ranks, arguments)
    text = done.stdout + done.stderr
    assert done.returncode == 2, text
    assert "Traceback" not in text, text
    sentences = [line for line in text.splitlines() if "error: " in line]
    assert sentences, text
    for word in words:
        assert any(word in sentence for sentence in sentences), text
    return text


def test_token_outside_the_vocabulary(folder: Path) -> None:
    write_data(folder / "foreign", top=5000)
    wrong(folder, 2, ["--model", str(folder / "model"), "--data-path", str(folder / "foreign"), "--split", "100,0,0",
                      "--train-iters", "2", "--eval-iters", "0", *COMMON], "foreign", "vocabulary")


def test_optimizer_state_of_another_split(folder: Path) -> None:
    saved = folder / "zero2"
    run_cases([mock(folder, 2, "--save", str(saved), "--use-distributed-optimizer")], 2, folder)
    wrong(folder, 1, mock(folder, 4, "--load", str(saved), "--use-distributed-optimizer"),
          "split over 2 data parallel ranks", "--finetune")
    wrong(folder, 2, mock(folder, 4, "--load", str(saved)), "--use-distributed-optimizer")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize("more", [[], ["--use-distributed-optimizer"]], ids=["plain", "sharded"])
def test_full_disk_while_saving(folder: Path, tmp_path: Path, more: list[str]) -> None:
    save_tiny(tmp_path / "hf")
    disk = tmp_path / "disk"
    disk.mkdir()
    # room for the weights but not for all of the optimizer state
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not let tests mount a small disk")
    try:
        done = subprocess.run([sys.executable, "pretrain_gpt.py", *mock(folder, 1, "--save", str(disk / "run"), *more),
                               "--metrics-file", str(tmp_path / "m.jsonl"), "--tensorboard-dir", str(tmp_path / "tb")],
                              cwd=REPO, env=environment(), capture_output=True, text=True, timeout=200)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "cannot write" in errors[0] and str(disk) in errors[0]
        assert not list(disk.rglob("*.pt")) and not list(disk.rglob("*.part"))
        assert not list(disk.rglob("latest_checkpointed_iteration.txt"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
