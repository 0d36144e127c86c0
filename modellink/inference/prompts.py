"""Turns flags, generation_config.json and the tokenizer into requests."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modellink.config.errors import ConfigError, ProblemList
from modellink.config.files import read_json
from modellink.config.settings import Settings
from modellink.inference.request import Request, SamplingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASKS = ("greedy", "do_sample")
LATER_TASKS = ("beam_search", "beam_search_with_sampling", "return_output_log_probs", "chat")
END_OF_TURN = "<|im_end|>"
GENERATION_CONFIG = "generation_config.json"
# field -> what a generation_config.json may say; null there means that the model does not care
NUMBERS: dict[str, tuple[type | tuple[type, ...], Callable[[Any], bool], str]] = {
    "max_new_tokens": (int, lambda value: value >= 1, "a whole number of at least 1"),
    "temperature": ((int, float), lambda value: value > 0, "a number above 0"),
    "top_k": (int, lambda value: value >= 0, "a whole number of at least 0"),
    "top_p": ((int, float), lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
}
UNUSED = {"repetition_penalty": 1.0, "num_beams": 1}  # what this version does not do: name -> the value without effect


@dataclass(frozen=True)
class Defaults:
    """What a model's generation_config.json asks for.

    Attributes:
        values: of the fields in NUMBERS that it has.
        stop_ids: its end-of-sequence tokens.
        notices: what it asks for that this version does not do.
    """

    values: dict[str, Any]
    stop_ids: frozenset[int] = frozenset()
    notices: tuple[str, ...] = ()


def read_defaults(folders: list[Path]) -> Defaults:
    """Read the first generation_config.json in `folders`.

    Raises:
        ConfigError: a value that cannot be used.
    """
    path = next((folder / GENERATION_CONFIG for folder in folders if (folder / GENERATION_CONFIG).is_file()), None)
    if path is None:
        return Defaults({})
    content = read_json(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__} instead of an object; fetch the file again.")
    values = {name: content[name] for name in NUMBERS if content.get(name) is not None}
    for name, value in values.items():
        kind, holds, rule = NUMBERS[name]
        if isinstance(value, bool) or not isinstance(value, kind) or not holds(value):
            raise ConfigError(f"{path}: {name} is {value!r}, but it must be {rule}; correct it.")
    stops = content.get("eos_token_id")
    ids = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if not all(isinstance(token, int) for token in ids):
        raise ConfigError(f"{path}: eos_token_id is {stops!r}, but it must be a token id or a list of them; "
                          "correct it.")
    notices = tuple(f"{path}: {name} {content[name]} has no effect in this version."
                    for name, without in UNUSED.items() if content.get(name) not in (None, without))
    return Defaults(values, frozenset(ids), notices)


def config_folders(settings: Settings) -> list[Path]:
    """Where a generation_config.json may lie: with the weights, in the copies kept beside them, with the tokenizer."""
    load, tokenizer = settings.checkpoint.load, settings.data.tokenizer_name_or_path
    folders = [Path(load), Path(load) / "hf"] if load else []
    return folders + ([Path(tokenizer)] if tokenizer else [])


def find_stop_ids(tokenizer: "PreTrainedTokenizerBase", defaults: Defaults) -> frozenset[int]:
    """Tokens that end an answer: the model's, the tokenizer's end of text, and its end of a turn."""
    found = set(defaults.stop_ids)
    if tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    end_of_turn = tokenizer.get_vocab().get(END_OF_TURN)
    if end_of_turn is not None:
        found.add(end_of_turn)
    return frozenset(found)


def find_tasks(settings: Settings) -> list[str]:
    """The tasks of `--task`; greedy when it is not given.

    Raises:
        ConfigError: a task that is unknown or of a later version.
    """
    problems = ProblemList()
    tasks = settings.generation.task or ["greedy"]
    for task in tasks:
        if task in LATER_TASKS:
            problems.add(f"--task {task}: this version does {' and '.join(TASKS)}, {task} comes with a later one; "
                         "choose one of the two.")
        elif task not in TASKS:
            problems.add(f"--task {task}: no such task of inference.py; choose {' or '.join(TASKS)}.")
    problems.raise_if_any()
    return tasks


def check_prompts(settings: Settings) -> list[str]:
    """The prompts of the command line.

    Raises:
        ConfigError: there is none, or one is empty or not UTF-8 text.
    """
    if not settings.generation.prompt:
        raise ConfigError('--prompt is missing: give the text to complete, for example --prompt "How are you?".')
    for prompt in settings.generation.prompt:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # the shell's bytes, which Python keeps as lone surrogates
            raise ConfigError(f"--prompt {prompt!r}: not UTF-8 text ({error.reason}); give UTF-8.") from error
    return settings.generation.prompt


def sampling_settings(settings: Settings, defaults: Defaults, task: str,
                      stop_ids: frozenset[int]) -> SamplingSettings:
    """Settings of a task: a flag that was given, else the model's generation_config.json, else the flag's default."""
    values = {name: getattr(settings.generation, name) if name in settings.given or name not in defaults.values
              else defaults.values[name] for name in NUMBERS}
    return SamplingSettings(**values, greedy=task == "greedy", seed=settings.train.seed, stop_ids=stop_ids)


def make_requests(prompts: list[list[int]], sampling: SamplingSettings, max_length: int | None,
                  context: int) -> list[Request]:
    """Requests whose answers end where the context or `--max-length` does.

    Args:
        prompts: token ids of the prompts.
        max_length: of `--max-length`.
        context: most tokens that the run may have in a row.

    Raises:
        ConfigError: a prompt without a token, or one that leaves no room for an answer.
    """
    requests: list[Request] = []
    problems = ProblemList()
    for number, prompt in enumerate(prompts, 1):
        limit, name = context, f"the {context} positions of this run; shorten it or raise --seq-length"
        if max_length is not None and max_length < context:
            limit, name = max_length, f"--max-length {max_length}; shorten it or raise --max-length"
        room = limit - len(prompt)
        if not prompt:
            problems.add(f"--prompt number {number}: the text has no token; write something.")
        elif room < 1:
            problems.add(f"--prompt number {number}: {len(prompt)} tokens leave no room for an answer in {name}.")
        else:
            requests.append(Request(prompt, replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))))
    problems.raise_if_any()
    return requests
