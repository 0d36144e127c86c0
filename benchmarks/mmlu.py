"""MMLU 5-shot by log-likelihoods against lm-eval's own model of transformers: questions/s on the same machine.

    python benchmarks/mmlu.py --data MMLU_FOLDER [--model HF_FOLDER] [--subjects 2] [--questions 32]

Both sides stand behind lm-eval's interface, have the same weights and get the same requests, in processes of their own,
in turn; the time is that of the whole `loglikelihood` call, tokenization included, after a warm-up on another subject.
Without `--model` a random model of the true Qwen1.5 vocabulary is made (needs the dashscope package). lm-eval's model
computes the four choices of a question in one pass; the engine also computes what the questions of a subject share
once. MMLU has 246 questions in a subject on average, so few questions a subject understate the ratio of the whole.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flags import REPO, add_output, number, open_output
from shapes import TRAINING
from sides import largest, run_side

from modellink.config.errors import ConfigError, run_command
from modellink.config.parser import Parser

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

SHAPE: dict[str, Any] = TRAINING | {
    "vocab_size": 151936, "max_position_embeddings": 4096, "rope_theta": 1e6, "eos_token_id": 151643,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# largest difference of two log-likelihoods; measured in fp32: 2e-6
LIMITS = {"fp32": 1e-3, "bf16": 0.5}
# prompts of 464, 265, 377, 277 and 2799 tokens
SUBJECTS = ("college_biology", "world_religions", "abstract_algebra", "management", "high_school_european_history")
WARM_UP = "astronomy"


def make_model(folder: Path, precision: str) -> None:
    """A random model with the true tokenizer, as a Hugging Face folder."""
    import torch

    sys.path.insert(0, str(REPO / "tests"))
    from qwen_vocabulary import ABSENT, source, write_tokenizer
    from transformers import Qwen2Config, Qwen2ForCausalLM

    if source() is None:
        raise ConfigError(f"{ABSENT}; or give --model.")
    torch.manual_seed(0)
    write_tokenizer(folder)
    Qwen2ForCausalLM(Qwen2Config(**SHAPE)).to(getattr(torch, DTYPES[precision])).save_pretrained(folder)


def make_requests(options: argparse.Namespace, subjects: list[str], count: int) -> list[Any]:
    """lm-eval's requests for the first questions of some subjects, in the form of our own mmlu task, 5-shot."""
    from lm_eval.api.instance import Instance

    from modellink.config.settings import parse_settings
    from modellink.evaluation.plan import make_plans

    (plan,) = make_plans(parse_settings("benchmark", "", ["--task", "mmlu", "--task-data-path", str(options.data),
                                                          "--limit", str(count)]))
    questions = [question for question in plan.questions if question.subject in subjects]
    if len(questions) != count * len(subjects):
        raise ConfigError(f"--data {options.data}: has not got {count} questions of each of {', '.join(subjects)}; ask "
                          "fewer --questions, or give the whole of MMLU.")
    return [Instance("loglikelihood", {}, (question.prompt(), choice), 0)
            for question in questions for choice in question.choices]


def start_ours(options: argparse.Namespace) -> tuple[Any, Any]:
    """The engine behind lm-eval's interface, and a function that waits for the device."""
    from modellink.config.settings import parse_settings
    from modellink.runtime import prepare_run
    from modellink.start import start

    settings = parse_settings("benchmark", "", [
        "--load", str(options.model), "--tokenizer-name-or-path", str(options.model), "--device", options.device,
        f"--{options.precision}"])
    run = prepare_run(settings, 1, "generate")
    device = start(run)
    from modellink.evaluation.lm_eval_model import EngineLM
    from modellink.evaluation.together import Together
    from modellink.inference.frontend import Frontend
    from modellink.inference.load import load_engine

    frontend = Frontend.of(settings)
    return EngineLM(Together(load_engine(run, device), frontend.tokenizer), frontend, 0), device.synchronize


def start_peer(options: argparse.Namespace) -> tuple[Any, Any]:
    """lm-eval's own model, and a function that waits for the device."""
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(options.model), dtype=DTYPES[options.precision], device=options.device,
                 batch_size=options.peer_batch_size)
    return model, lambda: model.model.get_input_embeddings().weight[0, 0].item()


def ask(options: argparse.Namespace) -> dict[str, Any]:
    """Ask all questions once and return the speed and the answers."""
    model, wait = {"ours": start_ours, "peer": start_peer}[options.side](options)
    subjects = list(SUBJECTS[:options.subjects])
    model.loglikelihood(make_requests(options, [WARM_UP], 2), disable_tqdm=True)
    requests = make_requests(options, subjects, options.questions)
    wait()
    start, start_cpu = time.perf_counter(), time.process_time()
    answers = model.loglikelihood(requests, disable_tqdm=True)
    wait()
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    count = options.questions * options.subjects
    return {"questions_per_second": count / seconds, "questions_per_cpu_second": count / cpu, "seconds": seconds,
            "answers": [answer[0] for answer in answers]}


def measure(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one side in its own process."""
    command = [sys.executable, str(Path(__file__)), "--side", side]
    for name in ("data", "model", "subjects", "questions", "precision", "device", "peer_batch_size"):
        command += ["--" + name.replace("_", "-"), str(getattr(options, name))]
    return run_side(command)


def make_parser() -> Parser:
    parser = Parser(prog="mmlu.py", description="MMLU 5-shot questions/s against lm-eval's own model, in one run.")
    parser.add_argument("--data", type=Path, required=True, help="MMLU's folder, with dev/ and test/")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder (default: a random model)")
    parser.add_argument("--subjects", type=int, default=2, choices=range(1, len(SUBJECTS) + 1), help="subjects to ask")
    parser.add_argument("--questions", type=number, default=32, help="questions of each subject")
    parser.add_argument("--rounds", type=number, default=2, help="turns of each side; the best counts")
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32", help="of weights and arithmetic")
    parser.add_argument("--peer-batch-size", type=number, default=1, help="lm-eval's batch size; 1 is the best on CPUs")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to run")
    add_output(parser, "mmlu.json")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    if options.side:
        print(json.dumps(ask(options)), flush=True)
        return 0
    if not options.data.is_dir():
        raise ConfigError(f"--data {options.data}: no such folder; give MMLU's, which has dev/ and test/.")
    open_output(options.output)
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            options.model = Path(folder)
            make_model(options.model, options.precision)
        turns: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
        for _ in range(options.rounds):
            for side, found in turns.items():
                found.append(measure(side, options))
    best = {side: max(found, key=lambda turn: turn["questions_per_second"]) for side, found in turns.items()}
    own, other = (best[side].pop("answers") for side in ("ours", "peer"))
    for side, record in best.items():
        print(f"{side:5} {record['questions_per_second']:7.2f} questions/s  "
              f"{record['questions_per_cpu_second']:7.2f} questions/CPU second")
    ratio = best["ours"]["questions_per_second"] / best["peer"]["questions_per_second"]
    difference = largest([abs(a - b) for a, b in zip(own, other, strict=True)])
    if not difference <= LIMITS[options.precision]:
        raise SystemExit(f"the largest difference of two log-likelihoods is {difference:.1e}, which rounding in "
                         f"{options.precision} does not explain: the two sides do not compute the same")
    print(f"ratio {ratio:.2f}x questions/s, largest difference of a log-likelihood {difference:.1e}", flush=True)
    results = {"settings": {name: getattr(options, name) for name in
                            ("subjects", "questions", "precision", "device", "peer_batch_size", "rounds")},
               **best, "ratio": ratio, "largest_difference": difference}
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
