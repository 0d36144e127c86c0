"""The launcher: first failure first, its exit code, signals with grace, log files, checks before ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hccl_failures import HCCP, NO_SOCKET, WAITED

from modellink.cli import VERBS
from modellink.config import ConfigError
from modellink.launch.options import LaunchOptions, parse_job
from modellink.launch.preflight import check_job, program_of
from modellink.launch.ranks import rank_environments
from modellink.launch.report import Failure, failure_report, first_failure, own_error

pytestmark = pytest.mark.alone

REPO = Path(__file__).parent.parent
END_SECONDS = 30  # a job must end this soon after a rank has died
GLOO = """
import os, signal, sys, torch
import torch.distributed as dist
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
dist.barrier()
print("rank", rank, "is up", flush=True)
if rank == 1:
    {death}
dist.all_reduce(torch.ones(3))
"""
SAVER = """
import os, signal, sys, time
def save(number, frame):
    print("got", signal.Signals(number).name, flush=True)
    time.sleep({seconds})
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
print("ready", flush=True)
time.sleep(60)
"""


def command(script: Path, *flags: str, arguments: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, "-m", "modellink.cli", "launch", "--log-dir", str(script.parent / "logs"), *flags,
            str(script), *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPO)}


def launch(script: Path, *flags: str, arguments: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(script, *flags, arguments=arguments), capture_output=True, text=True, timeout=120,
                          env=environment(), cwd=script.parent)


def write(folder: Path, text: str) -> Path:
    path = folder / "job.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize("death, code, said", [
    ('raise ValueError("the data ran dry")', 1, "ValueError: the data ran dry"),
    ("os.kill(os.getpid(), signal.SIGKILL)", 137, "killed by SIGKILL"),
    ('print("error: X: wrong; do Y.", file=sys.stderr); sys.exit(2)', 2, "error: X: wrong; do Y.")])
def test_a_dead_rank_ends_the_job_with_its_own_error_first(death: str, code: int, said: str, tmp_path: Path) -> None:
    start = time.monotonic()
    result = launch(write(tmp_path, GLOO.format(death=death)), "--nproc-per-node", "3")
    assert time.monotonic() - start < END_SECONDS
    assert result.returncode == code
    terminal = result.stdout + result.stderr
    assert said in terminal and "rank 1 failed first" in result.stderr
    # the neighbours' lost connections are in their logs only
    assert "onnection" not in terminal
    assert "rank 0 (exit code 1), rank 2 (exit code 1)" in result.stderr
    assert "onnection" in (tmp_path / "logs" / "rank_0.log").read_text()
    for rank in range(3):
        assert f"rank {rank} is up" in (tmp_path / "logs" / f"rank_{rank}.log").read_text()


def test_ranks_that_do_not_notice_are_stopped(tmp_path: Path) -> None:
    start = time.monotonic()
    script = write(tmp_path, "import os, signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
                             "if os.environ['RANK'] == '0': time.sleep(100)\nraise SystemExit(3)")
    result = launch(script, "--nproc-per-node", "2")
    assert result.returncode == 3 and time.monotonic() - start < END_SECONDS
    assert "rank 1 failed first (exit code 3)" in result.stderr and "rank 0 (stopped)" in result.stderr


def test_a_job_that_works(tmp_path: Path) -> None:
    script = write(tmp_path, "import os, sys\nprint('out', os.environ['RANK'], sys.argv[1:])\n"
                             "print('err', os.environ['RANK'], file=sys.stderr)\n"
                             "print(*(os.environ[n] for n in ('WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', "
                             "'MASTER_ADDR', 'TORCH_DEVICE_BACKEND_AUTOLOAD')))")
    result = launch(script, "--nproc-per-node", "2", arguments=("--nproc-per-node", "9", "x"))
    assert result.returncode == 0
    assert result.stdout == "out 0 ['--nproc-per-node', '9', 'x']\nerr 0\n2 0 2 127.0.0.1 0\n" and result.stderr == ""
    assert (tmp_path / "logs" / "rank_1.log").read_text() == (
        "out 1 ['--nproc-per-node', '9', 'x']\nerr 1\n2 1 2 127.0.0.1 0\n")


def test_an_error_that_rank_0_survives_reaches_the_terminal(tmp_path: Path) -> None:
    result = launch(write(tmp_path, "print('error: not so bad')\nprint('done')"), "--nproc-per-node", "1")
    assert result.returncode == 0 and result.stdout == "error: not so bad\ndone\n"


def start_saver(folder: Path, seconds: float, *flags: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(command(write(folder, SAVER.format(seconds=seconds)), "--nproc-per-node", "2", *flags),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=folder)
    logs = [folder / "logs" / f"rank_{rank}.log" for rank in range(2)]
    for _ in range(600):
        if all(log.is_file() and "ready" in log.read_text() for log in logs):
            return process
        time.sleep(0.1)
    raise AssertionError("the ranks did not start")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_rank_and_waits_for_its_save(number: signal.Signals, tmp_path: Path) -> None:
    process = start_saver(tmp_path, 2.0)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and f"{number.name}: waiting up to 60 s" in errors
    for rank in range(2):
        assert (tmp_path / "logs" / f"rank_{rank}.log").read_text() == f"ready\ngot {number.name}\nsaved\n"


def test_grace_ends(tmp_path: Path) -> None:
    process = start_saver(tmp_path, 50.0, "--grace-period", "1")
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - start < 10 and process.returncode == 128 + signal.SIGTERM
    assert "rank 0, 1 did not exit in time and had to be killed" in errors


def test_two_nodes_are_one_job(tmp_path: Path) -> None:
    script = write(tmp_path, GLOO.format(death="pass") + (
        "print('sum over', dist.get_world_size(), flush=True)\ndist.destroy_process_group()\n"))
    from modellink.launch.ranks import free_port

    flags = ["--nproc-per-node", "1", "--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    nodes = [subprocess.Popen(command(script, *flags, "--node-rank", str(node)), env=environment(), text=True,
                              stdout=subprocess.PIPE) for node in range(2)]
    outputs = [node.communicate(timeout=90)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    assert outputs == [f"rank {node} is up\nsum over 2\n" for node in range(2)]


def test_the_rank_with_a_cause_of_its_own_counts(tmp_path: Path) -> None:
    start = "Traceback (most recent call last):\n"
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    logs[0].write_text(f"[rank0]: {start}[rank0]: RuntimeError: Connection closed by peer [127.0.0.1]:1\n")
    logs[1].write_text(f"line\n{start}KeyError: 1\n\nDuring handling of the above exception, another exception "
                       f"occurred:\n\n{start}ValueError: bad\n")
    early, late = Failure(0, 1, 1.0, logs[0]), Failure(1, 1, 2.0, logs[1])
    assert first_failure([early, late]) == (late, True)
    assert first_failure([early]) == (early, False)
    assert own_error(logs[1]).startswith(f"{start}KeyError") and own_error(logs[1]).endswith("ValueError: bad")
    assert own_error(logs[0]).startswith(f"{start}RuntimeError")


FRAMES = 'Traceback (most recent call last):\n  File "train.py", line 1, in <module>\n    step()\n'


def test_npu_ranks_that_waited_for_another_are_no_cause(tmp_path: Path) -> None:
    """They may end first; a failure of HCCL that does not say that it waited stands behind any other cause only."""
    texts = {"waited": FRAMES + WAITED, "no socket": FRAMES + NO_SOCKET, "hccp": FRAMES + HCCP,
             "suspect": f"{FRAMES}RuntimeError: step: NPU function error: reason=[suspect remote error], error code is "
                        "507057\n", "bad": f"{FRAMES}ValueError: bad\n",
             "sentence": "error: hccl does not start on rank 1 of 4: HCCL function error: x, error code is 4: EL0004: "
                         "Failed to allocate memory; see that every rank is up\n",
             "late": "error: hccl does not start on rank 2 of 4: HCCL function error: x, error code is 6: EI0006 "
                     "Getting socket times out. Reason: Remote Rank; see that every rank is up\n"}
    ended = {name: Failure(i, 1, float(i), tmp_path / name) for i, name in enumerate(texts)}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)

    def first(*names: str) -> tuple[str, bool]:
        failure, own = first_failure([ended[name] for name in names])
        return failure.log.name, own

    assert first("waited", "no socket", "suspect") == ("waited", False)  # another node's rank was the first
    assert first("suspect") == ("suspect", False)
    aborted = [Failure(0, -signal.SIGABRT, 0.0, tmp_path / name) for name in ("waited", "bad")]
    assert [first_failure([failure, ended["hccp"]])[0].log.name for failure in aborted] == ["hccp", "bad"]
    assert first("waited", "no socket", "hccp") == ("hccp", True)
    assert first("waited", "no socket", "hccp", "bad") == ("bad", True)
    assert first("waited", "hccp", "sentence") == first("sentence", "late") == ("sentence", True)
    assert first("waited", "late") == ("late", True)
    message = failure_report([ended["waited"]], [], [], nnodes=2)[0]
    assert message.startswith("every failed rank of this node lost its connection: look into the logs of the other")


def test_a_node_without_a_cause_of_its_own_says_where_to_look(tmp_path: Path) -> None:
    log = tmp_path / "rank_4.log"
    log.write_text("RuntimeError: Connection reset by peer")
    failure = Failure(4, 1, 1.0, log)
    message, code = failure_report([failure], [5], [], nnodes=2)
    assert code == 1 and message.startswith("every failed rank of this node lost its connection: look into the logs")
    assert message.endswith("after it ended: rank 5 (stopped).")
    assert "rank 5 ended before them with exit code 0" in failure_report([failure], [], [5], nnodes=1)[0]


@pytest.mark.parametrize("flags, said", [
    (("--nproc-per-node", "0"), "--nproc-per-node 0: must be at least 1"),
    (("--nnodes", "0"), "--nnodes 0: must be at least 1"),
    (("--nnodes", "2"), "--nnodes 2 needs --master-addr and --master-port"),
    (("--node-rank", "1"), "--node-rank 1: must be between 0 and 0"),
    (("--master-port", "70000"), "--master-port 70000: must be between 1 and 65535")])
def test_wrong_launcher_flags(flags: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        check_job(parse_job([*flags, str(write(tmp_path, ""))]))
    assert len(error.value.problems) == 1 and error.value.problems[0].startswith(said)


def test_wrong_command_lines_are_one_sentence(tmp_path: Path) -> None:
    for words, said in (([], "the script is missing"), (["--nproc", "2", "a.py"], "unknown flag --nproc"),
                        ([str(tmp_path / "no.py")], "no such script")):
        with pytest.raises(ConfigError, match=said):
            check_job(parse_job(words))


def test_a_port_in_use_is_found_before_ranks_start(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(ConfigError, match=f"--master-port {port}: cannot be used"):
            check_job(parse_job(["--master-port", port, str(write(tmp_path, ""))]))


def test_threads_are_shared_among_ranks_unless_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert rank_environments(LaunchOptions(), 1)[0]["OMP_NUM_THREADS"] == str(cores)
    assert rank_environments(LaunchOptions(), 4 * cores)[0]["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert rank_environments(LaunchOptions(), 2)[1]["OMP_NUM_THREADS"] == "5"


def test_checks_run_only_for_our_own_programs(tmp_path: Path) -> None:
    assert program_of(str(write(tmp_path, "from modellink import x"))) is None
    other = tmp_path / "pretrain_gpt.py"
    other.write_text("import megatron")
    assert program_of(str(other)) is None
    other.write_text("from modellink.training import x")
    assert program_of(str(other)) == "train"


def test_all_problems_of_a_job_come_before_a_rank_starts(tmp_path: Path) -> None:
    script = tmp_path / "pretrain_gpt.py"
    script.write_text("# modellink\nopen('started', 'w')")
    result = launch(script, "--nproc-per-node", "3", "--node-rank", "7", arguments=(
        "--model", "qwen15-7b", "--tensor-model-parallel-size", "2", "--mock-data", "--lr", "1",
        "--overlap-param-gather"))
    assert result.returncode == 2 and result.stdout == ""
    for part in ("--node-rank 7", "world size 3", "--train-iters", "--seq-length", "--overlap-param-gather"):
        assert part in result.stderr
    assert result.stderr.count("error: ") == 5 and "Traceback" not in result.stderr
    assert not (tmp_path / "started").exists() and not (tmp_path / "logs").exists()


def test_memory_of_this_host_is_checked_before_a_rank_starts(tmp_path: Path) -> None:
    script = tmp_path / "pretrain_gpt.py"
    script.write_text("# modellink\n")
    arguments = ["--model", "qwen15-110b", "--mock-data", "--lr", "1", "--train-iters", "1", "--seq-length", "64"]
    with pytest.raises(ConfigError, match="memory: 8 ranks on this host need at least"):
        check_job(parse_job(["--nproc-per-node", "8", str(script), *arguments, "--device", "cpu"]))


def test_help_is_fast_and_imports_no_torch() -> None:
    code = "import sys, modellink.cli\nmodellink.cli.dispatch(['--help'])\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), stdout=subprocess.DEVNULL)
    times = []
    for _ in range(3):
        start = time.monotonic()
        result = subprocess.run([sys.executable, "-m", "modellink.cli", "--help"], env=environment(),
                                capture_output=True, text=True)
        times.append(time.monotonic() - start)
        assert result.returncode == 0 and "launch" in result.stdout and "doctor" in result.stdout
    assert min(times) < 0.3


def test_doctor_names_device_and_versions() -> None:
    result = subprocess.run([sys.executable, "-m", "modellink.cli", "doctor", "--device", "cpu"], env=environment(),
                            capture_output=True, text=True)
    assert result.returncode == 0 and "megatron-core" in result.stdout and "chosen: cpu" in result.stdout
    assert ("  attention: tiles of queries up to 512 tokens, torch scaled_dot_product_attention beyond\n"
            in result.stdout)
    assert ("  rms_norm: parts of rows in the cache (not torch.compile of the formulas: --compile is off)\n"
            in result.stdout)
    assert "the device is" not in result.stdout  # forms of other devices are no news


def test_unknown_verbs_are_one_sentence() -> None:
    result = subprocess.run([sys.executable, "-m", "modellink.cli", "lunch"], env=environment(), capture_output=True,
                            text=True)
    assert result.returncode == 2
    assert result.stderr == f"error: modellink: unknown verb lunch; choose one of {', '.join(VERBS)}.\n"


def test_what_inference_is_asked_is_checked_before_its_ranks_start(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("{\n")
    job = parse_job([str(REPO / "inference.py"), "--task", "gredy", "--prompts-file", str(tmp_path / "p.jsonl"),
                     "--hf-chat-template", "--prompt-type", "qwen"])
    with pytest.raises(ConfigError) as error:
        check_job(job)
    said = "\n".join(error.value.problems)
    for part in ("did you mean greedy?", "p.jsonl, line 1: broken JSON", "two templates", "--load is missing"):
        assert part in said


ASKER = """
import os, sys
if os.environ["RANK"] == "0":
    print("Your name? ", end="", flush=True)
    name = sys.stdin.readline().strip()
    print("error is no error:", name, end="", flush=True)
"""


def test_rank_0_talks_with_whoever_started_the_job(tmp_path: Path) -> None:
    """Standard input reaches it, and a line is shown before it ends."""
    with subprocess.Popen(command(write(tmp_path, ASKER), "--nproc-per-node", "2"), env=environment(), cwd=tmp_path,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as job:
        assert job.stdin is not None and job.stdout is not None
        assert job.stdout.read(11) == b"Your name? "  # nothing was written yet
        job.stdin.write(b"Ada\n")
        job.stdin.close()
        assert job.stdout.read() == b"error is no error: Ada"
        assert job.wait(END_SECONDS) == 0
    assert (tmp_path / "logs" / "rank_0.log").read_text() == "Your name? error is no error: Ada"


LISTENER = """
import os, signal, sys, time
count = 0
def heard(number, frame):
    global count
    count += 1
    print("heard", count, flush=True)
    if count == {last}:
        sys.exit(130)
signal.signal(signal.SIGINT, heard)
print("ready", flush=True)
for _ in range(300):
    time.sleep(0.1)
"""
PASSING = """
import sys
from modellink.launch.options import LaunchOptions
from modellink.launch.ranks import Ranks
options = LaunchOptions(log_dir=sys.argv[2], grace_period=1.0)
sys.exit(Ranks(options, 2, [sys.executable, sys.argv[1]], passes_interrupts=True).run())
"""


@pytest.mark.parametrize("last, gaps, code, said", [
    (2, (1.0,), 130, ""),  # the ranks left when they were interrupted the second time: no failure to report
    (9, (0.1, 0.1), 130, "had to be killed")])  # three in a hurry: whoever presses them wants the job to end
def test_interrupts_are_the_ranks_own_matter(last: int, gaps: tuple[float, ...], code: int, said: str,
                                             tmp_path: Path) -> None:
    script = write(tmp_path, LISTENER.format(last=last))
    with subprocess.Popen([sys.executable, "-c", PASSING, str(script), str(tmp_path / "logs")], env=environment(),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None and job.stderr is not None
        logs = [tmp_path / "logs" / f"rank_{rank}.log" for rank in range(2)]
        while not all(log.is_file() and "ready" in log.read_text() for log in logs):
            assert job.poll() is None
            time.sleep(0.05)
        job.send_signal(signal.SIGINT)
        for gap in gaps:
            time.sleep(gap)
            job.send_signal(signal.SIGINT)
        err = job.stderr.read()
        assert job.wait(END_SECONDS) == code
    assert (said in err) if said else err == ""
    assert all("heard 1" in log.read_text() for log in logs)
