"""Asks the questions of the tasks on this rank; rank 0 keeps the answers, scores and reports."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modellink.config.errors import ConfigError, ProblemList
from modellink.config.settings import Settings, parse_settings
from modellink.evaluation.judging import judge
from modellink.evaluation.plan import Loaded, Plan, load, make_plans, question_key, weights_fingerprint
from modellink.evaluation.protocols import Asker, Response, kind_of
from modellink.evaluation.question import GENERATION, LOGLIKELIHOOD
from modellink.evaluation.report import summarize, table, write_report
from modellink.evaluation.resume import Answers
from modellink.inference.defaults import Defaults, config_folders, find_stop_ids, read_defaults
from modellink.inference.request import SamplingSettings
from modellink.models.run import Run
from modellink.parallel.rank import Rank
from modellink.runtime import TITLES, prepare_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from modellink.inference.talk import Talk

CHUNK = 128  # questions that are asked, and kept, together
INTERRUPTED = 130  # exit code of a program that SIGINT ended


def main(argv: Sequence[str] | None = None) -> int:
    """Check everything, start this rank, ask, score; rank 0 prints and writes."""
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # torch, not imported before this line, reads it
    settings = parse_settings("evaluation.py", TITLES["evaluate"], argv)
    plans, run, defaults = _check(settings)

    from modellink.data.tokenizer import load_tokenizer

    assert settings.data.tokenizer_name_or_path is not None, "prepare_run asks for the tokenizer"
    tokenizer = load_tokenizer(settings.data.tokenizer_name_or_path, use_fast=not settings.data.tokenizer_not_use_fast)
    problems = ProblemList()
    loaded = [found for found in (problems.catch(lambda plan=plan: load(plan, settings, run, tokenizer))  # type: ignore[misc]
                                  for plan in plans) if isinstance(found, Loaded)]
    problems.raise_if_any()

    is_printer = Rank.from_environment().rank == 0
    folder = Path(settings.evaluation.evaluation_output)
    names = settings.generation.add_eos_token or []
    kept = [_open_answers(task, folder) if is_printer else None for task in loaded]
    try:
        return _evaluate(settings, run, loaded, kept, tokenizer, find_stop_ids(tokenizer, defaults, names))
    except KeyboardInterrupt:
        if is_printer:
            print(f"stopped; the answers so far are in {folder}, the same command goes on from there.",
                  file=sys.stderr, flush=True)
        return INTERRUPTED


def _check(settings: Settings) -> tuple[list[Plan], Run, Defaults]:
    """Everything that can be wrong before a tokenizer or a device is needed, in one message."""
    problems = ProblemList()
    plans = problems.catch(lambda: make_plans(settings))
    problems.catch(lambda: check_output(settings))
    run = problems.catch(lambda: prepare_run(settings, Rank.from_environment().world_size, "evaluate"))
    defaults = problems.catch(lambda: read_defaults(config_folders(settings)))
    problems.raise_if_any()
    assert isinstance(plans, list) and isinstance(run, Run) and isinstance(defaults, Defaults)
    return plans, run, defaults


def check_output(settings: Settings) -> None:
    """The output folder must be one, or not be there yet.

    Raises:
        ConfigError: it is a file, or nothing can be made there.
    """
    folder = Path(settings.evaluation.evaluation_output)
    if folder.is_dir():
        place = folder
    else:
        place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ConfigError(f"--evaluation-output {folder}: {'is a file' if folder.is_file() else 'cannot be written'}; "
                          "choose another folder.")


def _open_answers(loaded: Loaded, folder: Path) -> Answers:
    folders = [Path(loaded.values[name]) for name in ("weights", "adapters") if loaded.values[name] is not None]
    values = {**loaded.values, "weights files": [weights_fingerprint(folder) for folder in folders]}
    del values["limit"]  # it says which questions are asked, not how
    return Answers(folder / f"{loaded.task.name}.answers.jsonl", values)


def _evaluate(settings: Settings, run: Run, tasks: Sequence[Loaded], kept: Sequence[Answers | None],
              tokenizer: "PreTrainedTokenizerBase", stop_ids: frozenset[int]) -> int:
    is_printer = any(answers is not None for answers in kept)
    for notice in [notice for task in tasks for notice in task.notices] if is_printer else ():
        print(notice, file=sys.stderr, flush=True)
    from modellink.start import start

    device = start(run)
    from modellink.inference.load import load_engine  # imports megatron.core, which is prepared by now
    from modellink.inference.talk import Talk
    from modellink.parallel.groups import stop_groups

    engine, talk = load_engine(run, device), Talk()
    engine.max_batch_size = settings.evaluation.evaluation_batch_size
    engine.is_interruptible = False  # Ctrl-C ends the run, whose answers are kept
    generation = settings.generation
    sampling = SamplingSettings(greedy=settings.evaluation.greedy, temperature=generation.temperature,
                                top_k=generation.top_k, top_p=generation.top_p, seed=settings.train.seed,
                                stop_ids=stop_ids)
    responses = []
    for task, answers in zip(tasks, kept):
        asker = Asker(engine, tokenizer, sampling, task.values["num_samples"])
        responses.append(ask_all(task, asker, answers, talk))
        if is_printer and not task.task.runs_code:
            report(task, responses[-1], Path(settings.evaluation.evaluation_output))
    stop_groups()
    # no rank waits for others while programs run
    for task, found in zip(tasks, responses):
        if is_printer and task.task.runs_code:
            report(task, found, Path(settings.evaluation.evaluation_output))
    return 0


def ask_all(loaded: Loaded, asker: Asker, answers: Answers | None, talk: "Talk") -> list[Response]:
    """Responses to all questions, on rank 0 in their order (elsewhere an empty list); every rank takes part.

    Args:
        loaded: a task.
        asker: asks the engine.
        answers: kept ones, on rank 0; chunks that are whole there are not asked again.
        talk: of this rank.
    """
    from tqdm import tqdm

    prepared = loaded.prepared
    keys = [question_key(question) for question in prepared]
    chunks = [range(start, min(start + CHUNK, len(prepared))) for start in range(0, len(prepared), CHUNK)]
    if answers is not None and answers.notice:
        print(answers.notice, file=sys.stderr, flush=True)
    todo = talk.tell(lambda: [number for number, chunk in enumerate(chunks)
                              if answers is not None and not all(keys[i] in answers.found for i in chunk)])
    done = len(prepared) - sum(len(chunks[number]) for number in todo)
    with tqdm(total=len(prepared), initial=done, desc=loaded.task.name, unit="q", disable=answers is None,
              file=sys.stderr, dynamic_ncols=True) as bar:
        for number in todo:
            found = asker.responses([prepared[i] for i in chunks[number]])
            if answers is not None:
                answers.add([keys[i] for i in chunks[number]], found)
            bar.update(len(chunks[number]))
    return [] if answers is None else [answers.found[key] for key in keys]


def how(loaded: Loaded) -> str:
    """The protocols that a task's questions are really asked in."""
    kinds = {kind_of(prepared.question) for prepared in loaded.prepared}
    return " and ".join(name for kind, name in (("choices", LOGLIKELIHOOD), ("text", GENERATION), ("window", "windows"))
                        if kind in kinds)


def report(loaded: Loaded, responses: Sequence[Response], folder: Path) -> None:
    """Score, print the table, write both files."""
    records, extra = judge(loaded, responses)
    task, values = loaded.task, loaded.values
    lines = summarize(records, task.metric)
    form = ", chat" if values["chat_template"] else ""
    title = f"{task.name}: {how(loaded)}, {values['num_fewshot']}-shot{form}"
    written = write_report(folder, task.name, values, lines, records, {"metric": task.metric, **extra})
    print(table(title, task.metric, lines), flush=True)
    for name, result in extra.items():
        error = result["stderr"]
        print(f"{name}  {result['score']:.4f}  {'-' if error is None else f'{error:.4f}'}", flush=True)
    print(f"written: {written[0]}, {written[1]}", file=sys.stderr, flush=True)
