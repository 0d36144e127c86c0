"""The benchmarks as a user runs them, at the smallest size: what they compute and count, never how fast."""

import json
import os
import re
import statistics
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data_helpers import make_tokenizer, paragraphs
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from modellink.config import ConfigError, run_command
from modellink.config.model import ModelConfig
from modellink.models.presets.qwen15 import PRESETS
from modellink.ops.table import TABLE

REPO = Path(__file__).parents[1]
FOLDER = REPO / "benchmarks"
sys.path.insert(0, str(FOLDER))

import convert  # noqa: E402
import decode  # noqa: E402
import fits  # noqa: E402
import instruction  # noqa: E402
import lora_step  # noqa: E402
import mmlu  # noqa: E402
import operations  # noqa: E402
import preprocess  # noqa: E402
import shapes  # noqa: E402
import train_step  # noqa: E402
import tuning  # noqa: E402
from sides import LOSS_LIMITS, require_same_losses  # noqa: E402
from turns import run_in_turn  # noqa: E402

PROGRAMS: dict[str, Any] = {"decode.py": decode, "instruction.py": instruction, "lora_step.py": lora_step,
                            "mmlu.py": mmlu, "operations.py": operations, "preprocess.py": preprocess,
                            "train_step.py": train_step, "tuning.py": tuning}
SIZES = [name for name in shapes.NAMES if name != "small"]
# of the official config.json files: hidden, MLP, layers, heads, rows of the vocabulary, tied, rope base
OFFICIAL = {"0.5b": (1024, 2816, 24, 16, 151936, True, 1e6), "1.8b": (2048, 5504, 24, 16, 151936, False, 1e6),
            "4b": (2560, 6912, 40, 20, 151936, False, 5e6), "7b": (4096, 11008, 32, 32, 151936, False, 1e6)}
SMALL_LAYER = ["--layers", "1"]
GIB = 2**30


def run(module: Any, words: list[str], output: Path) -> Any:
    """A benchmark in this process, its sides in their own; returns its JSON."""
    assert run_command(module.main, [*words, "--output", str(output)]) == 0
    return json.loads(output.read_text())


def matmul_flops(config: dict[str, Any], seq_length: int) -> float:
    """FLOPs of forward and backward for a token: of transformers' own linear layers, and half of all scores."""
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**config))
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    scores = config["num_hidden_layers"] * 2 * (2 * seq_length * config["hidden_size"]) / 2
    return 3 * (2 * weights + scores)


@pytest.mark.parametrize("name", SIZES)
def test_named_shapes_are_the_official_ones(name: str) -> None:
    hidden, mlp, layers, heads, words, is_tied, theta = OFFICIAL[name]
    assert shapes.shape_of(name, {}) == PRESETS[f"qwen15-{name}"].to_hf()
    config = Qwen2Config(**shapes.shape_of(name, {}))
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads,
            config.num_key_value_heads, config.vocab_size, config.tie_word_embeddings) == (
        hidden, mlp, layers, heads, heads, words, is_tied)
    assert config.rope_parameters["rope_theta"] == theta and config.rms_norm_eps == 1e-6
    assert shapes.shape_of(name, {}, layers=3)["num_hidden_layers"] == 3
    assert shapes.shape_of(name, {}, positions=99999)["max_position_embeddings"] == 99999


@pytest.mark.parametrize("name", shapes.NAMES)
def test_flops_and_mfu(name: str) -> None:
    """FLOPs are those of the products, attention counted causally; MFU is their share of the rate of the chip."""
    options = train_step.make_parser().parse_args(["--shape", name, "--seq-length", "4096", "--layers", "2",
                                                   "--precision", "bf16"])
    config = train_step.shape(options)
    found = train_step.utilisation(1000.0, config, options, "NVIDIA H200")
    assert found["tflops"] == pytest.approx(1000 * matmul_flops(config, 4096) / 1e12)
    assert found["mfu"] == pytest.approx(found["tflops"] / 989)
    assert train_step.utilisation(1000.0, config, options, "cpu") == found | {"mfu": None}
    options.precision = "fp32"  # the known rates are those of 16 bits
    assert train_step.utilisation(1000.0, config, options, "NVIDIA H200")["mfu"] is None


@pytest.mark.parametrize(("turns", "precision"), [
    ("step", "fp32"), pytest.param("run", "bf16", marks=pytest.mark.slow)])
def test_train_step(turns: str, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--precision", precision, "--turns", turns, "--rounds", "1", "--steps", "4", "--warmup", "1", "--batch",
             "4", "--micro-batch", "2", "--seq-length", "16", "--threads", "1", *SMALL_LAYER]
    found = run(train_step, words, tmp_path / "new" / "out.json")
    config = train_step.shape(train_step.make_parser().parse_args(words))
    ours, peer = found[precision]["ours"], found[precision]["peer"]
    count = sum(p.numel() for p in Qwen2ForCausalLM(Qwen2Config(**config)).parameters())
    for side in (ours, peer):
        assert len(side["losses"]) == 4 and len(side["times"]) == 3  # the same number of steps
        assert side["seconds"] == statistics.median(side["times"])
        assert side["tokens_per_second"] == pytest.approx(4 * 16 / side["seconds"])
        assert side["tflops"] == pytest.approx(side["tokens_per_second"] * matmul_flops(config, 16) / 1e12)
        assert side["mfu"] is None and side["device"] == "cpu" and side["parameters_on_rank"] == count
        assert GIB / 8 < side["peak_bytes"] < 8 * GIB
    # fp32 weights, gradients and two moments; ours in bf16 has 16-bit weights beside the fp32 ones
    assert peer["state_bytes_per_parameter"] == pytest.approx(16, abs=1e-3)
    assert ours["state_bytes_per_parameter"] == pytest.approx(16 if precision == "fp32" else 18, abs=1e-3)
    # equal from the first step on, which shows the forward, to the last, which shows gradients and updates
    difference = max(abs(own - other) for own, other in zip(ours["losses"], peer["losses"]))
    assert ours["largest_difference_of_losses"] == difference < LOSS_LIMITS[precision][1]
    assert ours["losses"][0] - ours["losses"][3] > 3 * difference
    pairs = [other / own for own, other in zip(ours["times"], peer["times"])]
    ratio = statistics.median(pairs) if turns == "step" else ours["tokens_per_second"] / peer["tokens_per_second"]
    assert ours["speed_ratio"] == pytest.approx(ratio)
    assert ours["memory_ratio"] == pytest.approx(ours["peak_bytes"] / peer["peak_bytes"])
    assert "SDPA" in peer["kernels"] and set(ours["kernels"]) == set(TABLE)
    assert f"{ratio:.2f}x tokens/s" in capsys.readouterr().out


@pytest.mark.slow
def test_layouts_compute_the_same(tmp_path: Path) -> None:
    found = run(train_step, ["--precision", "fp32", "--steps", "2", "--warmup", "1", "--seq-length", "16", "--threads",
                             "1", "--layers", "2", "--layouts"], tmp_path / "out.json")["fp32"]
    for layout in ("tp2", "tp2-sp", "pp2"):
        assert found[layout]["losses"] == pytest.approx(found["ours"]["losses"], abs=LOSS_LIMITS["fp32"][1])
        assert found[layout]["ratio_to_one_process"] == pytest.approx(
            found[layout]["tokens_per_second"] / found["ours"]["tokens_per_second"])
        assert found[layout]["parameters_on_rank"] < found["ours"]["parameters_on_rank"]


@pytest.mark.parametrize(("precision", "has_int8"), [
    ("bf16", True), pytest.param("fp32", False, marks=pytest.mark.slow)])
def test_decode(precision: str, has_int8: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    width = {"fp32": 4, "bf16": 2}[precision]
    words = ["--precision", precision, "--batch", "2", "--prompt-length", "5", "--new-tokens", "24",
             "--repeats", "1", "--rounds", "1", *SMALL_LAYER, *([] if has_int8 else ["--no-int8-cache"])]
    found = run(decode, words, tmp_path / "out.json")
    config = found["shape"]
    assert config == decode.shape(decode.make_parser().parse_args(words)) and config["num_hidden_layers"] == 1
    for name in ("prefill", "decode", "unequal"):
        ours, peer = found["ours"]["2"][name], found["transformers"]["2"][name]
        assert ours > 0 and peer > 0
        assert found["ratio"]["2"][name] == pytest.approx(ours / peer)
    # transformers finds our tokens the best ones
    assert 0 <= found["largest_gap"] < decode.GAP_LIMITS[precision]
    full = found["cache"]["full"]
    heads, size = config["num_key_value_heads"], config["hidden_size"] // config["num_attention_heads"]
    assert full["bytes_per_token"] == 2 * heads * size * width
    longest = max(len(prompt) + count - 1 for prompt, count in decode.make_jobs(
        decode.make_parser().parse_args(words), 2)["unequal"])
    caches = [cache for name, cache in found["cache"].items() if name in ("full", "int8")]
    for cache in caches:
        assert cache["bytes"] >= 2 * longest * cache["bytes_per_token"]
        assert cache["bytes"] % cache["bytes_per_token"] == 0
    shown = capsys.readouterr().out
    if has_int8:
        int8 = found["cache"]["int8"]
        assert int8["bytes_per_token"] == 2 * heads * (size + 4)  # a scale in fp32 for each head
        assert found["cache"]["int8_to_full"] == pytest.approx(int8["bytes"] / full["bytes"])
        assert min(found["ours_int8_cache"]["2"].values()) > 0
    else:
        assert caches == [full] and found["ours_int8_cache"] is None
    assert "KV cache: " in shown and ("int8" in shown) == has_int8
    # prefill: each layer for every token, attention counted causally, the head for the last token
    device, use = found["device"], found["use"]["2"]
    head = config["vocab_size"] * config["hidden_size"]
    weights = matmul_flops(config, 0) / 6
    prompt = 5 * 2 * (weights - head) + 2 * head + matmul_flops(config, 5) / 3 * 5 - 5 * 2 * weights
    assert use["prefill_flops"] == pytest.approx(found["ours"]["2"]["prefill"] * prompt / 5)
    assert use["prefill_mfu"] is None and use["prefill_share"] == pytest.approx(use["prefill_flops"] / device["flops"])
    # a step of decoding: all weights once, and a cache of each row that is half filled with the answer
    read = width * weights + 2 * (5 + 24 / 2) * full["bytes_per_token"]
    assert use["decode_bytes_per_second"] == pytest.approx(found["ours"]["2"]["decode"] / 2 * read)
    assert use["decode_share"] == pytest.approx(use["decode_bytes_per_second"] / device["bytes_per_second"])


def test_operations(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, str(FOLDER / "operations.py"), "--seq-length", "16", "--micro-batch", "3", "--repeats", "1",
         "--precision", "bf16", "--output", str(output)], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert (found["device"], found["shape"]) == ("cpu", "small")
    records = {record["operation"]: record for record in found["bf16"]["operations"]}
    s, b, h, f, words, e = 16, 3, 512, 1376, 32000, 2
    t = s * b
    # FLOPs of the products, bytes read and written once
    expected = {
        "rms_norm forward": (0, e * (2 * t * h + h)),
        "rms_norm backward": (0, e * (3 * t * h + 2 * h)),
        "rotary (queries) forward": (0, e * 2 * t * h),
        "rotary (queries) backward": (0, e * 2 * t * h),
        "swiglu forward": (0, e * 3 * t * f),
        "swiglu backward": (0, e * 5 * t * f),
        "attention forward": (2 * (2 * t * s * h) / 2, e * 4 * t * h),
        "attention backward": (4 * (2 * t * s * h) / 2, e * 8 * t * h),
        "cached_attention (one token)": (2 * 2 * b * s * h, e * (2 * t * h + 2 * b * h)),
        "frozen_linear (MLP, up, one token)": (2 * b * h * 2 * f, e * (b * h + 2 * f * h + b * 2 * f)),
        "cross_entropy, both ways": (0, e * 2 * t * words),
        "adamw": (0, 4 * 7 * 2 * f * h),
        "weight_gradient (MLP, up)": (2 * t * h * 2 * f, e * (t * h + t * 2 * f) + 4 * 2 * 2 * f * h),
        "column_linear (MLP, up) forward": (2 * t * h * 2 * f, e * (t * h + 2 * f * h + t * 2 * f)),
        "column_linear (MLP, up) backward": (4 * t * h * 2 * f, e * (t * 2 * f + 2 * (t * h + 2 * f * h))),
        "row_linear (MLP, down) forward": (2 * t * f * h, e * (t * f + f * h + t * h)),
        "row_linear (MLP, down) backward": (4 * t * f * h, e * (t * h + 2 * (t * f + f * h))),
    }
    assert {name: (record["flops"], record["bytes"]) for name, record in records.items()} == expected
    flops, rate = found["bf16"]["ceiling_flops"], found["bf16"]["ceiling_bytes"]
    for record in records.values():
        allowed = max(record["flops"] / flops, record["bytes"] / rate)
        assert record["roofline_share"] == pytest.approx(allowed / record["seconds"])
    # on one rank `linear` is what the two parallel ones run
    assert {re.match(r"\w+", name).group() for name in records} == set(TABLE) - {"linear"}  # type: ignore[union-attr]


@pytest.mark.parametrize(("module", "words", "said"), [
    (train_step, ["--shape", "9b"], "argument --shape: invalid choice: '9b'"),
    (train_step, ["--steps", "two"], "argument --steps: 'two' is not a whole number above 0"),
    (train_step, ["--layers", "0"], "argument --layers: '0' is not a whole number above 0"),
    (train_step, ["--presicion", "fp32"], "unknown flag --presicion; did you mean --precision?"),
    (train_step, ["--steps", "2"], "--steps 2: no step is left after --warmup 2; give more steps."),
    (train_step, ["--batch", "3"], "--batch 3 is not a multiple of --micro-batch 2; change one of them."),
    (train_step, ["--flags=--seqence-parallel"], "--flags: unknown flag --seqence-parallel; did you mean"),
    (train_step, ["--flags=it's"], "--flags \"it's\": No closing quotation; quote it as in a shell."),
    (train_step, ["--output", str(FOLDER)], f"{FOLDER}: is a folder; name a file for the result."),
    (train_step, ["--output", str(FOLDER / "turns.py" / "x.json")], "x.json: cannot write: File exists"),
    (operations, ["--device", "cuda"], "--device cuda: "),
    (operations, ["--repeats", "-1"], "argument --repeats: '-1' is not a whole number above 0"),
    (decode, ["--batch", "1", "x"], "argument --batch: 'x' is not a whole number above 0"),
    (decode, ["--new-tokens", "1"], "--new-tokens 1: the first token is the prompt's; give 2 or more."),
    (decode, ["--device", "npu"], "--device npu: "),
    (train_step, ["--device", "npu", "--clock", "cpu"], "--clock cpu with --device npu: an accelerator's work is no"),
    (decode, ["--flags=--cuda-graph"], "--flags: unknown flag --cuda-graph; did you mean"),
    (lora_step, ["--steps", "2"], "--steps 2: the first 2 are warm-up; give more."),
    (tuning, ["--input", "nowhere.json"], "--input nowhere.json: no such file; give Alpaca records"),
    (mmlu, [], "the following arguments are required: --data"),
    (mmlu, ["--data", "nowhere"], "--data nowhere: no such folder; give MMLU's"),
    (instruction, ["--tokenizer", "x", "--input", "nowhere.json"], "--input nowhere.json: no such file"),
    (convert, ["--rounds", "0"], "--rounds 0: must be above 0."),
    (convert, ["--layers", "1"], "--layers 1: two pipeline stages need an even number."),
    (preprocess, ["--workers", "0"], "argument --workers: '0' is not a whole number above 0"),
])
def test_a_mistake_is_one_sentence(module: Any, words: list[str], said: str, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    json_flag = "--json" if module in (instruction, preprocess) else "--output"
    if "--output" not in words:
        words = [*words, json_flag, str(tmp_path / "new" / "out.json")]
    assert run_command(module.main, words) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert said in shown.err and list(tmp_path.iterdir()) == []


STEPPING = """
import sys
sys.path.insert(0, {folder!r})
from turns import wait_for_turn
for step in range({steps}):
    wait_for_turn()
    with open({log!r}, "a") as log:
        log.write("{name}{{}} ".format(step))
{end}
"""


def test_sides_take_turns_step_by_step(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def program(name: str, steps: int, end: str = "") -> list[str]:
        return [sys.executable, "-S", "-c",
                STEPPING.format(folder=str(FOLDER), steps=steps, log=str(log), name=name, end=end)]

    done = run_in_turn({"a": program("a", 2, "print('first'); print(1)"), "b": program("b", 2, "print(2)")}, {}, 2)
    assert done == {"a": "first\n1\n", "b": "2\n"}
    assert log.read_text() == "a0 b0 a1 b1 "
    for steps, said in ((1, "b, 1 of 2 steps begun, ended with exit code 0"), (3, "b wants to make more than 2")):
        with pytest.raises(RuntimeError, match=said):
            run_in_turn({"a": program("a", 2), "b": program("b", steps)}, {}, 2)
    with pytest.raises(RuntimeError, match="a, 2 of 2 steps begun, ended with exit code 1: (?s:.*)ZeroDivisionError"):
        run_in_turn({"a": program("a", 2, "1 / 0")}, {}, 2)
    refused = "print('error: --x 1: wrong.', file=sys.stderr); sys.exit(2)"
    with pytest.raises(ConfigError, match="^--x 1: wrong.$"):
        run_in_turn({"a": program("a", 0, refused), "b": program("b", 2)}, {}, 2)


def test_different_losses_end_the_comparison() -> None:
    assert require_same_losses([10.0, 9.0], [10.0, 9.0001], "fp32") == pytest.approx(1e-4)
    for other in ([10.0, 9.001], [10.0, float("nan")], [float("inf"), 9.0]):
        with pytest.raises(SystemExit, match="the two sides do not compute the same"):
            require_same_losses([10.0, 9.0], other, "fp32")
    assert require_same_losses([10.0, 9.0], [10.0, 9.01], "bf16") == pytest.approx(1e-2)  # updates let roundings grow
    with pytest.raises(SystemExit, match="differ by 1.0e-02"):
        require_same_losses([10.0, 9.0], [10.01, 9.0], "bf16")


class AliveBytes(TorchDispatchMode):
    """The most bytes of tensors that were alive at once inside."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in (out if isinstance(out, list | tuple) else [out]):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.sizes:
                    self.sizes[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage.data_ptr(), None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


def test_the_estimate_of_the_peer() -> None:
    options = train_step.make_parser().parse_args([
        "--side", "peer", "--precision", "bf16", "--layers", "2", "--seq-length", "256", "--batch", "2",
        "--micro-batch", "1", "--steps", "2", "--warmup", "1"])
    with AliveBytes() as alive:  # the second microbatch of the second step meets moments and gradients
        train_step.run_peer(options)
    assert alive.peak == pytest.approx(fits.peer_bytes(train_step.shape(options), 256), rel=5e-4)


def test_weights_for_generation_are_drawn_in_their_precision(tmp_path: Path) -> None:
    config = shapes.GENERATION | {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 1,
                                  "tie_word_embeddings": False}
    with AliveBytes() as alive:
        decode.make_model(tmp_path, config, "bf16")
    weights = load_file(tmp_path / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert alive.peak < 2.5 * sum(weight.numel() for weight in weights.values())


class Queue:
    """An accelerator on paper: what is launched runs later, one after the other; shapes alone are computed.

    `name`, `current`, `namespace` and the rest are those of `modellink.device`.
    """

    name = "cuda"
    launch_seconds = 50e-6  # Python's, for one kernel

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.log: list[str] = []
        self.namespace = SimpleNamespace(Event=self.event)

    def launch(self, name: str, seconds: float) -> None:
        self.log.append(name)
        self.host += self.launch_seconds
        self.device = max(self.device, self.host) + seconds

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace()

        def record() -> None:
            event.time = max(self.device, self.host)

        def elapsed_time(other: Any) -> float:
            assert self.host >= other.time > event.time  # after a synchronisation
            return 1e3 * (other.time - event.time)

        event.record, event.elapsed_time = record, elapsed_time
        return event

    def synchronize(self) -> None:
        self.host = max(self.host, self.device)

    def current(self) -> torch.device:
        return torch.device("meta")

    def product_name(self) -> str:
        return "NVIDIA H100 80GB HBM3"

    def peak_memory(self) -> int:
        return 1 if self.host == 0 else 2


def test_an_accelerator_is_timed_without_launches() -> None:
    queue = Queue()

    def kernels() -> None:  # three, each shorter than its launch
        for _ in range(3):
            queue.launch("run", 10e-6)

    seconds = operations.device_seconds(kernels, lambda: queue.launch("cover", 1e-3), 4, queue)
    assert seconds == pytest.approx(30e-6)
    assert queue.log == 2 * 3 * ["run"] + 4 * ["cover", "run", "run", "run"]


def test_memory_of_generation_is_read_before_the_ceilings_take_some() -> None:
    queue = Queue()

    class Launched(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            queue.launch(str(function), 1e-3)
            return function(*args, **(kwargs or {}))

    options = decode.make_parser().parse_args(["--device", "cuda", "--precision", "bf16"])
    model = ModelConfig.from_hf(decode.shape(options), "the test")
    with Launched():
        found = decode.measure_device(options, model, queue)
    assert found["peak_bytes"] == 1 and queue.peak_memory() == 2
    assert found["flops"] == pytest.approx(2 * 8192**3 / 1e-3)
    assert found["bytes_per_second"] == pytest.approx(2**31 / 1e-3)


def slow(module: Any, words: list[str], check: Callable[[Any], bool], name: str) -> Any:
    return pytest.param(module, words, check, id=name, marks=pytest.mark.slow)


@pytest.mark.parametrize(("module", "words", "check"), [
    slow(lora_step, ["--precision", "fp32", "--steps", "3", "--batch", "2", "--micro-batch", "1", "--seq-length", "16",
                     "--rounds", "1"],
         lambda found: found["fp32"]["ours"]["trained"] == found["fp32"]["peer"]["trained"] > 0, "lora_step"),
    slow(tuning, ["--steps", "2", "--batch", "2", "--micro-batch", "1", "--seq-length", "256", "--rounds", "1"],
         lambda found: found["packed"]["real_tokens_per_row"] > found["padded"]["real_tokens_per_row"] > 0, "tuning"),
])
def test_the_other_comparisons(module: Any, words: list[str], check: Callable[[Any], bool], tmp_path: Path) -> None:
    assert check(run(module, words, tmp_path / "out.json"))


@pytest.mark.slow
def test_preprocessing_is_compared_on_equal_bytes(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    done = subprocess.run([sys.executable, str(FOLDER / "preprocess.py"), "--megabytes", "0.1", "--workers", "1", "2",
                           "--runs", "1", "--json", str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert [row["workers"] for row in rows] == [1, 1, 2] and all(row["tokens_per_s"] > 0 for row in rows)


@pytest.mark.slow
def test_instructions_are_compared_on_equal_bytes(tmp_path: Path) -> None:
    records = [{"instruction": text, "input": "", "output": text[::-1]} for text in paragraphs(40)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    done = subprocess.run(
        [sys.executable, str(FOLDER / "instruction.py"), "--input", str(tmp_path / "records.json"), "--tokenizer",
         str(make_tokenizer(tmp_path / "tokenizer")), "--copies", "2", "--workers", "1", "--runs", "1", "--json",
         str(tmp_path / "out.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["records"] == 80 and len(found["rows"]) == 3 and "all files equal" in done.stdout
