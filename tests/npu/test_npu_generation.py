"""Generation and likelihoods on the simulated NPU are those of the cpu device: layouts, adapters, bf16, programs."""

from npu_environment import SIMULATE, require_simulation

require_simulation()

import json  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from data_helpers import make_tokenizer  # noqa: E402
from ladder import REPO, run_cases  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from quiz import write_quiz  # noqa: E402
from tiny import save_tiny, tiny_model  # noqa: E402

from modellink.checkpoint.convert import main as convert  # noqa: E402

GENERATE = Path(__file__).with_name("generation_worker.py")
EVALUATE = REPO / "tests" / "evaluation_cases.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
FP32, BF16 = ["--load", "@/model", "--fp32"], ["--load", "@/model", "--bf16"]
ADAPTED = [*FP32, "--lora-load", "@/adapters"]
REFERENCES = {"fp32": FP32, "bf16": BF16, "merged": ["--load", "@/merged", "--fp32"]}
# name: (ranks, words, reference)
RUNS = {
    "one": (1, FP32, "fp32"),
    "one-bf16": (1, BF16, "bf16"),
    "one-lora": (1, ADAPTED, "merged"),
    "tp2": (2, [*FP32, *TP2], "fp32"),
    "pp2": (2, [*FP32, *PP2], "fp32"),
    "dp2": (2, FP32, "fp32"),
    "tp2-bf16": (2, [*BF16, *TP2], "bf16"),
    "pp2-lora": (2, [*ADAPTED, *PP2], "merged"),
}
EXACT = [name for name, (_, _, reference) in RUNS.items() if reference != "bf16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of bf16 numbers, adapters made by PEFT, the merge of both by the converter, a tokenizer, a quiz."""
    base = tmp_path_factory.mktemp("generation")
    changes: dict[str, Any] = {"num_key_value_heads": 2, "num_hidden_layers": 2, "dtype": torch.bfloat16}
    save_tiny(base / "model", **changes)
    make_tokenizer(base / "model", 900)
    adapted = get_peft_model(tiny_model(**changes).float(), LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False))
    adapted.save_pretrained(base / "adapters")
    assert convert(["--from", "hf", "--to", "hf", "--load-dir", str(base / "model"), "--lora-load",
                    str(base / "adapters"), "--save-dir", str(base / "merged"), "--params-dtype", "fp32"]) == 0
    write_quiz(base / "quiz")
    return base


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, dict[str, Any]]:
    """{"cpu" or "npu": {name: answers}} and the operators that ran under "calls"."""
    answers: dict[str, dict[str, Any]] = {"cpu": {}, "npu": {}}
    for device, world in (("cpu", 1), ("npu", 1), ("npu", 2)):
        runs = REFERENCES if device == "cpu" else {
            name: words for name, (size, words, _) in RUNS.items() if size == world}
        place = folder / f"{device}{world}"
        place.mkdir()
        run_cases([[name, *(word.replace("@", str(folder)) for word in words), "--tokenizer-name-or-path",
                    str(folder / "model"), "--device", device] for name, words in runs.items()], world, place,
                  worker=GENERATE)
        (path,) = place.glob("*.answers")
        content = json.loads(path.read_text())
        answers[device] |= content | {f"calls{world}": content["calls"]}
    return answers


def flat(rows: list[list[float]]) -> np.ndarray:
    return np.array([value for row in rows for value in row])


@pytest.mark.parametrize("name", EXACT)
def test_answers_equal_those_of_the_cpu(name: str, found: dict[str, Any]) -> None:
    """Greedy, drawn and beam answers token for token, and likelihoods of given words."""
    got, expected = found["npu"][name], found["cpu"][RUNS[name][2]]
    for kind in ("tokens", "sampled", "beams"):
        assert got[kind] == expected[kind], kind
    assert len({tuple(row) for row in got["tokens"]}) == len(got["tokens"])
    for kind in ("first", "logprobs"):
        assert flat(got[kind]) == pytest.approx(flat(expected[kind]), abs=1e-4)


@pytest.mark.parametrize("kind", ["first", "logprobs"])
@pytest.mark.parametrize("name", [name for name in RUNS if name not in EXACT])
def test_likelihoods_in_bf16_differ_by_their_rounding(name: str, kind: str, found: dict[str, Any]) -> None:
    """Of the best first words of prompts, and of given words. Both devices round the answers in fp32: they differ by at
    most two such distances, and a third for chance."""
    rounding = abs(flat(found["cpu"]["bf16"]["logprobs"]) - flat(found["cpu"]["fp32"]["logprobs"])).max()
    assert abs(flat(found["npu"][name][kind]) - flat(found["cpu"]["bf16"][kind])).max() < 3 * rounding < 0.1


def test_the_operators_ran(found: dict[str, Any]) -> None:
    for world in (1, 2):
        assert {"npu::npu_rms_norm", "npu::npu_rotary_mul", "npu::npu_swiglu",
                "npu::npu_fused_infer_attention_score"} <= set(found["npu"][f"calls{world}"])


def test_inference_prints_the_text_of_the_cpu(folder: Path) -> None:
    """The program itself under the launcher, with prompts of different lengths."""
    texts = []
    for device, more in (("cpu", []), ("npu", TP2)):
        runner = [*TORCHRUN, str(SIMULATE)] if device == "npu" else []
        done = subprocess.run(
            [sys.executable, *runner, "inference.py", "--load", str(folder / "model"), "--tokenizer-name-or-path",
             str(folder / "model"), "--fp32", "--device", device, "--task", "greedy", "do_sample", "--max-new-tokens",
             "12", "--top-k", "20", "--seed", "3", "--prompt", "Hello", "The quick brown fox jumps over", *more],
            cwd=REPO, env=dict(os.environ), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        texts.append([line for line in done.stdout.splitlines() if line.startswith("[")])
    assert len(set(texts[0])) == 4 and texts[1] == texts[0]


def test_evaluation_keeps_the_likelihoods_of_the_cpu(folder: Path) -> None:
    contents = []
    for device in ("cpu", "npu"):
        cases = folder / f"evaluation-{device}.json"
        cases.write_text(json.dumps([[
            "--load", str(folder / "model"), "--tokenizer-name-or-path", str(folder / "model"), "--fp32", "--device",
            device, "--task", "mmlu", "--task-data-path", str(folder / "quiz"), "--num-fewshot", "1",
            "--evaluation-output", str(folder / f"scores-{device}")]]))
        runner = [str(SIMULATE)] if device == "npu" else []
        done = subprocess.run([sys.executable, *runner, str(EVALUATE), str(cases)], cwd=REPO, env=dict(os.environ),
                              capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        contents.append(json.loads((folder / f"scores-{device}" / "mmlu.json").read_text()))
    cpu, npu = ([question["response"]["logprobs"] for question in content["questions"]] for content in contents)
    assert len(cpu) == 40 and flat(npu) == pytest.approx(flat(cpu), abs=1.01e-4)  # four decimals are kept
