"""--use-deter-comp, and the rest of what a device is told before it starts."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ladder import REPO, read_metrics
from tiny import tiny_config

from modellink.config import ConfigError
from modellink.device.buffers import BufferSizes, parse_buffer_sizes
from modellink.device.cpu import CpuDevice
from modellink.device.cuda import CudaDevice
from modellink.device.npu import NpuDevice
from modellink.device.options import DeviceOptions, make_deterministic, refusals_explained

TRAIN = """
import json, sys
import pretrain_gpt, torch
code = pretrain_gpt.main(sys.argv[1:])
from modellink.config.settings import parse_settings
from modellink.models.build import transformer_config
from modellink.runtime import prepare_run
config = transformer_config(prepare_run(parse_settings("t", "t", sys.argv[1:]), 1, "train"), "cpu")
print(json.dumps({"torch": torch.are_deterministic_algorithms_enabled(), "core": config.deterministic_mode}))
sys.exit(code)
"""


@pytest.fixture
def own_torch_switch() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def test_two_runs_give_the_same_bits(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path / "model")
    base = ["--model", str(tmp_path / "model"), "--mock-data", "--seq-length", "64", "--train-iters", "5", "--lr",
            "1e-2", "--micro-batch-size", "4", "--global-batch-size", "8", "--eval-iters", "0", "--device", "cpu"]
    jobs = [subprocess.Popen([sys.executable, "-c", TRAIN, *base, "--metrics-file", str(tmp_path / f"{name}.jsonl"),
                              "--save", str(tmp_path / name), *more], cwd=REPO, text=True, stdout=subprocess.PIPE,
                             env=dict(os.environ, OMP_NUM_THREADS="2"))
            for name, more in (("one", ["--use-deter-comp"]), ("two", ["--deterministic-mode"]))]
    outputs = [job.communicate(timeout=200)[0].splitlines() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert [json.loads(lines[-1]) for lines in outputs] == [{"torch": True, "core": True}] * 2
    one, two = ([(record["loss"], record["grad_norm"]) for record in read_metrics(tmp_path / f"{name}.jsonl")]
                for name in ("one", "two"))
    assert one == two and len(set(one)) == 5
    weights = [torch.load(tmp_path / name / "iter_0000005" / "mp_rank_00" / "model_optim_rng.pt",
                          weights_only=False)["model"] for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items()
               if isinstance(value, torch.Tensor))


WANTED = {
    CpuDevice: {},
    CudaDevice: {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "^NVLS"},
    NpuDevice: {"HCCL_DETERMINISTIC": "true", "LCCL_DETERMINISTIC": "1", "CLOSE_MATMUL_K_SHIFT": "1",
                "ATB_MATMUL_SHUFFLE_K_ENABLE": "0", "ATB_LLM_LCOC_ENABLE": "0"},
}


@pytest.mark.parametrize("kind", WANTED)
def test_each_device_sets_what_its_libraries_read(kind: type, monkeypatch: pytest.MonkeyPatch,
                                                  own_torch_switch: None) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in WANTED[kind]}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr("modellink.device.options.make_deterministic.__defaults__", (environment,))
    kind().prepare(DeviceOptions(deterministic=False))
    assert not torch.are_deterministic_algorithms_enabled() and not WANTED[kind].keys() & environment.keys()
    kind().prepare(DeviceOptions(deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert {name: environment[name] for name in WANTED[kind]} == WANTED[kind]


def test_an_environment_that_demands_the_contrary(own_torch_switch: None) -> None:
    environment = {"HCCL_DETERMINISTIC": "strict"}
    make_deterministic({"HCCL_DETERMINISTIC": ("true", "strict")}, environment)
    assert environment == {"HCCL_DETERMINISTIC": "strict"}
    with pytest.raises(ConfigError, match="--use-deter-comp: the environment has X=false, .* set it to true"):
        make_deterministic({"X": ("true", "strict")}, {"X": "false"})


def test_an_operation_without_such_a_form_is_one_sentence(own_torch_switch: None) -> None:
    """`put_` without accumulation has none, on any device."""
    make_deterministic({}, {})
    with pytest.raises(ConfigError) as error, refusals_explained():
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    assert error.value.problems == ["--use-deter-comp: put_ cannot give the same bits again on this device; leave out "
                                    "the flag that uses it, or --use-deter-comp."]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), refusals_explained():
        torch.ones(2, 3) @ torch.ones(2, 3)


@pytest.mark.parametrize("minutes, connect, execute", [(1, "120", "68"), (10, "600", "600"), (400, "7200", "17340")])
def test_hccl_waits_as_long_as_the_flag_says(minutes: int, connect: str, execute: str,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HCCL_CONNECT_TIMEOUT", raising=False)
    monkeypatch.delenv("HCCL_EXEC_TIMEOUT", raising=False)
    NpuDevice().prepare(DeviceOptions(timeout_minutes=minutes))
    assert (os.environ["HCCL_CONNECT_TIMEOUT"], os.environ["HCCL_EXEC_TIMEOUT"]) == (connect, execute)
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "1")  # the user's own stays
    NpuDevice().prepare(DeviceOptions(timeout_minutes=minutes))
    assert os.environ["HCCL_EXEC_TIMEOUT"] == "1"


def test_sizes_of_buffers() -> None:
    sizes = parse_buffer_sizes(["100", "tp=400", "dp=50"])
    assert (sizes.asked("tp"), sizes.asked("dp_cp"), sizes.asked("world"), sizes.asked("pos_embd")) == (
        400, 50, 100, 100)
    assert parse_buffer_sizes(["tp=400"]).asked("dp_cp") is None and parse_buffer_sizes(None) == BufferSizes()
    for word, said in (("many", "the size must be a whole number"), ("tp=0", "the size must be"),
                       ("tp=", "the size must be"), ("xp=3", "there is no group xp; choose one of world, tp, dp")):
        with pytest.raises(ConfigError, match=f"--hccl-buffer-size {word}: {said}"):
            parse_buffer_sizes([word])
