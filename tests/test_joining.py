"""Devices that cannot be used and jobs whose ranks do not find each other: one sentence each, in bounded time."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from breaking_start_worker import DEAD
from ladder import REPO

from modellink.config import ConfigError
from modellink.device import select
from modellink.device.backends import group_place, reporting_start
from modellink.device.cpu import CpuDevice
from modellink.device.network import interface_problem
from modellink.device.select import select_device
from modellink.device.visible import visibility_problem
from modellink.doctor import main as doctor
from modellink.launch.options import parse_job
from modellink.launch.preflight import check_job
from modellink.launch.ranks import free_port
from modellink.launch.report import Failure, first_failure
from modellink.parallel import join as joining
from modellink.parallel.join import bind, check_devices, join
from modellink.parallel.rank import Rank

SECONDS = 1.0


@pytest.fixture
def port() -> Iterator[int]:
    """A port that answers nobody: something listens, and never speaks."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def problem_of_joining(monkeypatch: pytest.MonkeyPatch, rank: int, **environment: str) -> str:
    """The one sentence with which a rank of two gives up, within the timeout and torch's margin."""
    monkeypatch.setattr(joining, "MARGIN_SECONDS", 3.0)
    for name, value in {"MASTER_ADDR": "127.0.0.1", **environment}.items():
        monkeypatch.setenv(name, value)
    start = time.monotonic()
    with pytest.raises(ConfigError) as error:
        join(select_device("cpu"), Rank(rank, 2, rank, 2), timedelta(seconds=SECONDS))
    assert time.monotonic() - start < SECONDS + 5 and not dist.is_initialized()
    (sentence,) = error.value.problems
    return sentence


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    sentence = problem_of_joining(monkeypatch, 0, MASTER_PORT=str(port))
    assert sentence == f"--master-port {port}: is in use on this node; choose another, the same on every node."


def test_something_else_listens_at_the_address(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    assert f"rank 1 of 2 got no answer from rank 0 at 127.0.0.1:{port} within 1 s" in problem_of_joining(
        monkeypatch, 1, MASTER_PORT=str(port))


def test_nobody_listens_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = problem_of_joining(monkeypatch, 1, MASTER_PORT=str(free_port()))
    assert "got no answer from rank 0 at 127.0.0.1:" in sentence and "(Connection refused): see that node 0" in sentence


def test_one_deadline_for_all_of_joining(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something listens late, and never speaks: the wait for it is a part of the timeout, and not before it."""
    monkeypatch.setattr(joining, "MARGIN_SECONDS", 0.5)
    with socket.socket() as late:
        late.bind(("127.0.0.1", 0))
        place = late.getsockname()
        threading.Timer(1.8, late.listen).start()
        monkeypatch.setenv("MASTER_ADDR", place[0])
        monkeypatch.setenv("MASTER_PORT", str(place[1]))
        start = time.monotonic()
        with pytest.raises(ConfigError, match="got no answer from rank 0 at 127.0.0.1:[0-9]+ within 3 s"):
            join(select_device("cpu"), Rank(1, 2, 1, 2), timedelta(seconds=3))
        # two waits would take 1.8 + 3 s and the margin
        assert 1.8 < time.monotonic() - start < 4.6


def test_what_is_asked_later_has_the_whole_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joining leaves only the rest of its time to torch's store, which later groups are started over."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    join(select_device("cpu"), Rank(0, 1, 0, 1), timedelta(seconds=60))
    try:
        assert dist.distributed_c10d._get_default_store().timeout == timedelta(seconds=60)
    finally:
        dist.destroy_process_group()


def test_an_address_that_is_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    # TEST-NET-1 of RFC 5737, which no network routes
    assert "got no answer from rank 0 at 192.0.2.1:" in problem_of_joining(
        monkeypatch, 1, MASTER_ADDR="192.0.2.1", MASTER_PORT=str(free_port()))


def test_a_name_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--master-addr no-such-host.invalid: rank 1 cannot resolve this name" in problem_of_joining(
        monkeypatch, 1, MASTER_ADDR="no-such-host.invalid", MASTER_PORT=str(free_port()))


def test_a_rank_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "only 1 of 2 ranks joined within" in problem_of_joining(monkeypatch, 0, MASTER_PORT=str(free_port()))


@pytest.mark.parametrize("word", ["", "0", "70000", "http"])
def test_a_port_that_is_none(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    assert f"MASTER_PORT={word} in the environment must be a port" in problem_of_joining(
        monkeypatch, 1, MASTER_PORT=word)


def test_an_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = problem_of_joining(monkeypatch, 0, MASTER_PORT=str(free_port()), GLOO_SOCKET_IFNAME="lo,nosuch0")
    assert sentence.startswith("GLOO_SOCKET_IFNAME=lo,nosuch0: this machine has no network interface nosuch0; set it")


THERE = ("lo", "eth0", "eth1", "ib0")


@pytest.mark.parametrize("backend, value, fits", [
    ("gloo", "", True), ("gloo", "eth0", True), ("gloo", "eth", False), ("gloo", "eth0,ib0", True),
    ("gloo", "eth0,ib1", False), ("nccl", "eth", True), ("nccl", "=eth", False), ("nccl", "=eth0,wlan0", True),
    ("nccl", "^docker", True), ("nccl", "wlan,bond", False), ("hccl", "ib,wlan", True), ("hccl", "en", False)])
def test_how_backends_read_interfaces(backend: str, value: str, fits: bool) -> None:
    variable = f"{backend.upper()}_SOCKET_IFNAME"
    problem = interface_problem(backend, {variable: value}, THERE)
    assert (problem is None) == fits
    assert fits or (problem or "").startswith(f"{variable}={value}: ") and "eth0, eth1, ib0, lo" in (problem or "")


@pytest.mark.parametrize("environment, said", [
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 in the environment must be below WORLD_SIZE=2"),
    ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one in the environment must be whole numbers")])
def test_an_environment_that_contradicts_itself(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str],
                                                said: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        Rank.from_environment()


@pytest.mark.parametrize("program, words", [
    ("pretrain_gpt.py", "--model qwen15-0.5b --mock-data --seq-length 64 --train-iters 1 --lr 1e-3 --device cpu"),
    ("inference.py", "--load nowhere --tokenizer-name-or-path nowhere"),
    ("evaluation.py", "--load nowhere --tokenizer-name-or-path nowhere --task mmlu --task-data-path nowhere")])
def test_a_program_says_so_in_a_sentence(program: str, words: str) -> None:
    done = subprocess.run([sys.executable, program, *words.split()], cwd=REPO, capture_output=True, text=True,
                          env={**os.environ, "WORLD_SIZE": "two"})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "WORLD_SIZE=two in the environment must be whole numbers" in done.stderr


def test_a_size_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE=2 in the environment without MASTER_ADDR"):
        join(select_device("cpu"), Rank(0, 2, 0, 2), timedelta(seconds=SECONDS))


class Held(CpuDevice):
    """A device that another process holds."""

    name = "cuda"

    def set_current(self, local_rank: int) -> torch.device:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nfurther lines")

    def product_name(self) -> str:
        return str(self.set_current(0))

    def free_memory(self) -> int:
        return int(str(self.set_current(0)))


def test_a_device_that_does_not_start() -> None:
    with pytest.raises(ConfigError, match=r"^cuda 1 does not start on rank 3: CUDA error: all CUDA-capable devices are "
                                          r"busy or unavailable; another process may hold it"):
        bind(Held(), Rank(3, 4, 1, 2))


def test_whoever_asks_it_first_says_that_it_does_not_start(monkeypatch: pytest.MonkeyPatch,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    """Doctor goes on with the other devices, and a check before a run is a sentence as well."""
    monkeypatch.setitem(select._KINDS, "cuda", Held)
    busy = "start: CUDA error: all CUDA-capable devices are busy or unavailable; another process may hold it"
    assert doctor(["--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert f"cuda: not usable: it does not {busy}" in said and "chosen: cpu" in said
    with pytest.raises(ConfigError, match=f"^cuda does not {busy}"):
        doctor(["--device", "cuda"])
    with pytest.raises(ConfigError, match=f"^cuda does not {busy}"):
        check_job(parse_job(["--nproc-per-node", "1", "pretrain_gpt.py", "--model", "qwen15-0.5b", "--mock-data",
                             "--seq-length", "16", "--train-iters", "1", "--lr", "1e-3", "--device", "cuda"]))


HCCL = ("createHCCLComm:build/CMakeFiles/torch_npu.dir/compiler_depend.ts:102 HCCL function error: "
        "hcclCommInitRootInfoConfig(numRanks, &rootInfo, rank, config, &(comm->hcclComm_)), error code is {}\n"
        "[ERROR] 2025-04-27-03:11:08 (PID:540989, Device:0, RankID:1) ERR02200 DIST call hccl api failed.\n")
HCCL_SAYS = ("HCCL function error: hcclCommInitRootInfoConfig(numRanks, &rootInfo, rank, config, &(comm->hcclComm_)), "
             "error code is {}")
NCCL = ("NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, unhandled system error (run with "
        "NCCL_DEBUG=INFO for details), NCCL version 2.27.3\nncclSystemError: System call (e.g. socket, malloc) or "
        "external library call failed or device error. \nLast error:\n{}")


@pytest.mark.parametrize("text, said", [
    (HCCL.format(6) + "EI0006: [PID: 1292363] 2025-04-08-18:07:20.444.436 Getting socket times out. Reason: Remote "
     "Rank did not send the data in time.\n        Solution: 1. Check the rank service processes.\n        TraceBack "
     "(most recent call last):\n        more[FUNC:x][FILE:y.cc][LINE:1]\n",
     HCCL_SAYS.format(6) + ": EI0006 Getting socket times out. Reason: Remote Rank did not send the data in time. "
     "Solution: 1. Check the rank service processes"),
    (HCCL.format(4) + "EL0004: 2025-10-29-03:01:51.812.052 Failed to allocate memory.\n        Possible Cause: "
     "Available memory is insufficient.\n        Solution: Close applications not in use.\n        TraceBack "
     "(most recent call last):\n", HCCL_SAYS.format(4) + ": EL0004: Failed to allocate memory. Possible Cause: "
     "Available memory is insufficient. Solution: Close applications not in use"),
    (HCCL.format(15) + "EE9999: Inner Error!\nEE9999: [PID: 540989] 2025-04-27-03:11:08.269.791 get error: phyid:0 "
     "is err\n        TraceBack (most recent call last):\n",
     HCCL_SAYS.format(15) + ": EE9999 get error: phyid:0 is err"),
    (HCCL.format(1), HCCL_SAYS.format(1)),
    (NCCL.format("socketStartConnect: Connect to 192.168.19.14<5282> failed : No route to host\nException raised from"),
     NCCL.splitlines()[0] + ": socketStartConnect: Connect to 192.168.19.14<5282> failed : No route to host"),
    (NCCL.format("\nException raised from checkForNCCLErrorsInternal at x.cpp:2501"), NCCL.splitlines()[0]),
    ("[/pytorch/third_party/gloo/gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find address for: n0\nmore",
     "ifa != nullptr. Unable to find address for: n0"),
    (f"{'a' * 400}\nEI0001: {'b' * 400}", f"{'a' * 300}: EI0001: {'b' * 292}")])
def test_the_reason_that_a_library_gives_on_later_lines(text: str, said: str) -> None:
    """As HCCL and NCCL write: the first line only says which call has failed."""
    with pytest.raises(ConfigError) as error, reporting_start("hccl", "npu", "on rank 1 of 4"):
        raise RuntimeError(text)
    (sentence,) = error.value.problems
    assert sentence.startswith(f"hccl does not start on rank 1 of 4: {said}; see that every rank is up")
    assert "\n" not in sentence


def test_a_cpu_serves_any_number_of_ranks() -> None:
    check_devices(select_device("cpu"), Rank(7, 8, 7, 8))


def test_a_whole_program_ends_with_the_sentence(port: int) -> None:
    environment = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="2",
                       LOCAL_RANK="0", LOCAL_WORLD_SIZE="2", OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "pretrain_gpt.py", "--model", "qwen15-0.5b", "--mock-data", "--seq-length", "16",
         "--train-iters", "1", "--lr", "1e-3", "--device", "cpu"], cwd=REPO, env=environment, capture_output=True,
        text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: --master-port {port}: is in use on this node; choose another, the same on every node."]


GROUPS_THAT_BREAK = {
    "made": ([2, 2], "the data parallel group with cp (rank 0): ", "Unable to find address for: nosuch0; "),
    "first": ([2, DEAD], "the tensor model parallel group (ranks 0, 1): ", "Connection ")}


def test_a_group_that_does_not_start_ends_the_job_with_its_name(tmp_path: Path) -> None:
    """While it is made, and at its first collective: one sentence, also on the rank that waits for the other."""
    worker = Path(__file__).with_name("breaking_start_worker.py")
    subprocess.run([sys.executable, str(worker), str(tmp_path)], cwd=REPO, check=True, timeout=120,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    for kind, (codes, group, words) in GROUPS_THAT_BREAK.items():
        ended = json.loads((tmp_path / f"{kind}.json").read_text())
        logs = [(tmp_path / f"{kind}.{rank}.log").read_text() for rank in range(2)]
        assert [code for code, _ in ended] == codes and max(seconds for _, seconds in ended) < 20, (ended, logs)
        for rank, log in enumerate(logs):
            sentences = [line for line in log.splitlines() if line.startswith("error: gloo does not start on rank ")]
            assert len(sentences) == (codes[rank] == 2) and "Traceback" not in log, log
            if rank == 0:
                assert sentences[0].startswith(f"error: gloo does not start on rank 0 for {group}")
                for part in (words, "modellink doctor --device cpu", "ulimit -n", "GLOO_SOCKET_IFNAME"):
                    assert part in sentences[0]


@pytest.mark.parametrize("description, ranks, words", [
    ("TENSOR_MODEL_PARALLEL_GROUP", [2, 3], "the tensor model parallel group (ranks 2, 3)"),
    ("default_pg", range(16), "the default group (ranks 0, 1, 2, 3, 4, 5, 6, 7 and 8 more)")])
def test_how_a_group_is_named(description: str, ranks: Sequence[int], words: str) -> None:
    assert group_place(2, description, ranks) == f"on rank 2 for {words}"


def test_a_sentence_is_a_cause_of_its_own(tmp_path: Path) -> None:
    """The words of a rank that could not connect are no consequence of another's failure."""
    (tmp_path / "0.log").write_text("error: gloo does not start on rank 0 of 2: Connection refused; see that ...\n")
    (tmp_path / "1.log").write_text("Traceback (most recent call last):\nRuntimeError: Connection closed by peer\n")
    failures = [Failure(1, 1, 1.0, tmp_path / "1.log"), Failure(0, 2, 2.0, tmp_path / "0.log")]
    assert first_failure(failures) == (failures[1], True)
    (tmp_path / "2.log").write_text("error: gloo does not start on rank 2 for the model parallel group (ranks 2, 3): "
                                    "Too many open files; see that ...\n")
    failures.append(Failure(2, 2, 3.0, tmp_path / "2.log"))  # its peers noticed before it was done printing
    assert first_failure(failures) == (failures[2], True)


@pytest.mark.parametrize("value, ascending, said", [
    (None, True, None), ("0,1,2", True, None), ("0,2,10", True, None), ("", False, "hides every device"),
    ("-1", False, "hides every device"), ("GPU-8932f937,1", False, None), ("1,0", True, "rising order"),
    ("0, 1", True, "rising order"), ("0,0", True, "rising order"), ("a", True, "rising order")])
def test_what_the_visible_devices_say(value: str | None, ascending: bool, said: str | None) -> None:
    problem = visibility_problem("VISIBLE", {} if value is None else {"VISIBLE": value}, ascending=ascending)
    assert problem is None if said is None else problem is not None and said in problem and f"'{value}'" in problem


OTHER = """
from torch.utils import backend_registration
backend_registration._setup_privateuseone_for_python_backend("other")
from modellink.config import ConfigError
from modellink.device.select import select_device
assert select_device("auto").name == "cpu"
try:
    select_device("npu")
except ConfigError as error:
    print(error)
"""


def test_another_accelerator_in_torch_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", OTHER], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("--device npu: this torch works with other (torch.accelerator."), done.stderr
