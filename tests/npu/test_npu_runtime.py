"""What a run tells torch_npu before it starts, and the sentences with which a start fails, on the real package."""

from npu_environment import require_simulation

require_simulation()

import json  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from ladder import REPO  # noqa: E402

from modellink.launch.ranks import free_port  # noqa: E402

RUN = ["--model", "qwen15-0.5b", "--mock-data", "--seq-length", "16", "--train-iters", "1", "--lr", "1e-3",
       "--device", "npu"]
WORKER = Path(__file__).with_name("runtime_worker.py")


def test_options_and_environment_reach_the_process_groups(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER),
         str(tmp_path), *RUN, "--tensor-model-parallel-size", "2", "--hccl-buffer-size", "64", "tp=128",
         "--distributed-timeout-minutes", "5", "--use-deter-comp"],
        cwd=REPO, env=dict(os.environ), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["groups"] == {
            name: {"config": {"hccl_buffer_size": size}, "class": "ProcessGroupHCCL.Options", "calls": calls}
            for name, size, calls in (("world", 64, ["allreduce"]), ("tp", 128, ["allreduce"]), ("dp", 64, []),
                                      ("mp", 64, ["allreduce"]))}  # what is not in use takes no memory
        assert found["environment"] == {"HCCL_CONNECT_TIMEOUT": "300", "HCCL_EXEC_TIMEOUT": "300",
                                        "HCCL_DETERMINISTIC": "true"}
        assert found["internal formats"] == "disable"  # the worker has allowed them before


def failing(*words: str, **environment: str) -> str:
    """The one sentence with which pretrain_gpt.py ends."""
    done = subprocess.run([sys.executable, "pretrain_gpt.py", *RUN, *words], cwd=REPO, capture_output=True, text=True,
                          env=dict(os.environ, **environment), timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return sentence


def test_an_hccl_that_does_not_start() -> None:
    """The stub libraries have no HCCL: what torch_npu says about that becomes the sentence."""
    sentence = failing()
    assert sentence.startswith("error: hccl does not start on rank 0 of 1: Failed to find function HcclGetRootInfo; ")
    assert "--hccl-buffer-size" in sentence and "HCCL_SOCKET_IFNAME" in sentence


def test_an_hccl_that_does_not_start_for_a_group(tmp_path: Path) -> None:
    """torch_npu's own groups, at their first collective; the other rank waits for the first and ends with it."""
    port = free_port()
    ranks = [subprocess.Popen(
        [sys.executable, str(WORKER), str(tmp_path), *RUN, "--tensor-model-parallel-size", "2"], cwd=REPO, text=True,
        stderr=subprocess.PIPE, env=dict(os.environ, TRUE_GROUPS="1", RANK=str(rank), LOCAL_RANK=str(rank),
                                         WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                                         MASTER_PORT=str(port))) for rank in range(2)]
    said = [rank.communicate(timeout=100)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2] and not any("Traceback" in text for text in said), said
    for rank, words in ((0, "Failed to find function HcclGetRootInfo; "), (1, "")):
        (sentence,) = [line for line in said[rank].splitlines() if line.startswith("error: ")]
        assert sentence.startswith(f"error: hccl does not start on rank {rank} for the tensor model parallel group "
                                   f"(ranks 0, 1): {words}")


NAMED = """
import torch
from modellink.device.npu import NpuDevice
print(NpuDevice().product_name(), torch.npu.is_initialized())
"""


def test_the_product_is_asked_for_without_starting_an_npu() -> None:
    """Every rank's checks ask before it has its own NPU; the first one would else be started by all."""
    done = subprocess.run([sys.executable, "-c", NAMED], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[-2:] == ["Ascend910B1", "False"], done.stderr[-3000:]


@pytest.mark.parametrize("environment, said", [
    ({"LOCAL_WORLD_SIZE": "3"}, "3 ranks on this node, which has 2 visible npu devices: every rank needs one of its"),
    ({"ASCEND_RT_VISIBLE_DEVICES": "1,0"}, "ASCEND_RT_VISIBLE_DEVICES is set to '1,0', but must be device numbers in"),
    ({"ASCEND_RT_VISIBLE_DEVICES": ""}, "ASCEND_RT_VISIBLE_DEVICES is set to '', which hides every device"),
    ({"HCCL_SOCKET_IFNAME": "nosuch"}, "HCCL_SOCKET_IFNAME=nosuch: this machine has no network interface nosuch"),
    ({"GLOO_SOCKET_IFNAME": "nosuch"}, "GLOO_SOCKET_IFNAME=nosuch: this machine has no network interface nosuch"),
    ({"HCCL_DETERMINISTIC": "false"}, "the environment has HCCL_DETERMINISTIC=false, with which results differ")])
def test_a_start_that_cannot_succeed_says_why(environment: dict[str, str], said: str) -> None:
    assert said in failing(*(["--use-deter-comp"] if "HCCL_DETERMINISTIC" in environment else []), **environment)


PROFILE = """
from modellink.config import run_command
from modellink.config.settings import ProfileSettings
from modellink.device.select import select_device
from modellink.training.profiling import StepProfiler
from simulator import simulated_npu
import torch

def main(words):
    with simulated_npu():
        device = select_device("npu")
        device.set_current(0)
        profiler = StepProfiler(ProfileSettings(profile=True, profile_step_start=0, profile_step_end=1), device, 0)
        with profiler.step(1):
            torch.ones(3, device="npu") * 2

raise SystemExit(run_command(main))
"""


def test_a_profiler_that_writes_nothing_is_no_success(tmp_path: Path) -> None:
    """torch_npu's profiler needs libraries that no stub has, prints so and goes on; we must not."""
    paths = os.pathsep.join([str(REPO), str(Path(__file__).parent), str(REPO / "tests")])
    done = subprocess.run([sys.executable, "-c", PROFILE], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env=dict(os.environ, PYTHONPATH=paths))
    assert done.returncode == 2, done.stderr[-3000:]
    assert "error: --profile: the profiler of npu wrote no trace of steps 1 to 1" in done.stderr
    assert "TypeError" not in done.stderr + done.stdout and not list((tmp_path / "profile").iterdir())
