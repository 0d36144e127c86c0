"""What every task has."""

import dataclasses
import functools
import json
from abc import ABC, abstractmethod
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modellink.config.errors import ConfigError
from modellink.evaluation.question import GENERATION, LOGLIKELIHOOD, Judgement, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ACCURACY, EXACT_MATCH, PASS, PERPLEXITY_METRIC = "accuracy", "exact match", "pass@1", "perplexity"


@dataclasses.dataclass(frozen=True)
class Ask:
    """How a task is asked in this run.

    Attributes:
        path: of `--task-data-path`; None where the task needs none.
        fewshot_path: of `--fewshot-data-path`.
        protocol: `loglikelihood` or `generation`; None: the task's own.
        num_fewshot: examples; None: the task's own number.
        chat: questions are one user turn of the model's chat template.
        limit: most questions of a subject.
        lengths, depths: of needle and perplexity, in tokens and percent.
        context: most tokens that the run may have in a row.
        max_new_tokens: of an answer; None: the task's own.
        seed: of made-up questions.
        tokenizer: for tasks that count tokens.
    """

    path: Path | None = None
    fewshot_path: str | None = None
    protocol: str | None = None
    num_fewshot: int | None = None
    chat: bool = False
    limit: int | None = None
    lengths: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    context: int = 0
    max_new_tokens: int | None = None
    seed: int = 1234
    tokenizer: "PreTrainedTokenizerBase | None" = None


class Task(ABC):
    """A benchmark.

    Attributes:
        name: of `--task`.
        metric: what its score is called.
        protocols: those that it can be asked in, its own first.
        shots: examples unless `--num-fewshot` says otherwise.
        max_new_tokens: of a generated answer unless `--max-new-tokens` says otherwise.
        needs_data: it needs a `--task-data-path`.
        counts_tokens: its questions depend on the tokenizer.
        runs_code: judging runs what the model wrote.
    """

    name = ""
    metric = ACCURACY
    protocols: tuple[str, ...] = (GENERATION,)
    shots = 0
    max_new_tokens = 256
    needs_data = True
    counts_tokens = False
    runs_code = False

    @abstractmethod
    def questions(self, ask: Ask) -> list[Question]:
        """Every question, in the order of the files.

        Raises:
            ConfigError: the data is missing or of another form.
        """

    @abstractmethod
    def judge(self, question: Question, answer: str) -> Judgement:
        """Score a generated answer."""

    def num_shots(self, ask: Ask) -> int:
        """Examples in front of a question; chat asks without any unless told otherwise."""
        if ask.num_fewshot is not None:
            return ask.num_fewshot
        return 0 if ask.chat else self.shots

    def protocol(self, ask: Ask) -> str:
        """The protocol of this run; chat generates unless told otherwise."""
        if ask.protocol is not None:
            return ask.protocol
        return GENERATION if ask.chat and GENERATION in self.protocols else self.protocols[0]


def first(examples: list[Any], shots: int, place: str) -> list[Any]:
    """The first `shots` examples.

    Raises:
        ConfigError: there are fewer.
    """
    if len(examples) < shots:
        raise ConfigError(f"{place}: holds {len(examples)} examples, but {shots} are to stand before each question; "
                          f"lower --num-fewshot to at most {len(examples)}.")
    return examples[:shots]


@functools.cache
def _groups() -> dict[str, dict[str, list[str]]]:
    text = resources.files("modellink.evaluation").joinpath("groups.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, list[str]]] = json.loads(text)
    return found


def groups_of(task: str, subject: str) -> tuple[str, ...]:
    """The groups that a benchmark's authors put a subject in."""
    return tuple(group for group, subjects in _groups().get(task, {}).items() if subject in subjects)


def is_choice(protocol: str) -> bool:
    return protocol == LOGLIKELIHOOD
