"""lm-eval's own command line on a model of ours: `python -m modellink.evaluation.lm_eval ...`.

Flags of ours say what to load and how (`--load`, `--tokenizer-name-or-path`, `--tensor-model-parallel-size`,
`--max-batch-size` ...); all other words are lm-eval's (`--tasks`, `--num_fewshot`, `--limit`, `--output_path`,
`--include_path` ...). On several ranks the first one runs lm-eval, and the others follow its calls to the engine.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from modellink.config.errors import ConfigError, ProblemList, run_command
from modellink.config.settings import EvaluationSettings, Settings, parse_known_settings
from modellink.inference.defaults import RULES
from modellink.models.run import Run
from modellink.parallel.rank import Rank
from modellink.runtime import TITLES, prepare_run

if TYPE_CHECKING:
    from modellink.evaluation.together import Together
    from modellink.inference.frontend import Frontend

PROG = "modellink eval --backend lm-eval"
NAME = "modellink"
# what lm-eval's words would say and ours say here
OURS = {
    "-M": "the model is the one of --load", "-a": "the model is described by our flags",
    "--model_args": "the model is described by our flags",
    "--batch_size": "the requests of a step are --max-batch-size",
    "-b": "the requests of a step are --max-batch-size",
    "--max_batch_size": "the requests of a step are --max-batch-size",
}
OTHER_COMMANDS = ("ls", "validate")


def main(argv: Sequence[str] | None = None) -> int:
    """Check everything, start this rank, run lm-eval on the first one."""
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # torch, not imported before this line, reads it
    words = sys.argv[1:] if argv is None else list(argv)
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--backend lm-eval: the package lm-eval is not installed; pip install 'modellink[eval]'.")
    if words[:1] and words[0] in OTHER_COMMANDS:
        return run_cli(words)
    settings, rest = parse_words(words)
    run = _check(settings, rest)
    from modellink.inference.frontend import Frontend

    frontend = Frontend.of(settings)
    if Rank.from_environment().rank != 0:
        together = _start(run, frontend)
        together.follow()
        return _stop()
    from modellink.evaluation.lm_eval_model import EngineLM, StartedLM

    StartedLM.is_asked, StartedLM.started = False, None
    StartedLM.make = staticmethod(lambda: EngineLM(_start(run, frontend), frontend, settings.train.seed))
    described = {"pretrained": settings.checkpoint.load, "tokenizer": settings.data.tokenizer_name_or_path}
    rest = rest[1:] if rest[:1] == ["run"] else rest
    if "seed" in settings.given:
        rest += ["--seed", str(settings.train.seed)]
    code = run_cli(["run", "--model", NAME, "--model_args", json.dumps(described), *rest],
                   lambda: StartedLM.is_asked)
    if StartedLM.started is None:
        return code or int(run.dims.world_size > 1)  # other ranks wait for a model that lm-eval never asked for
    StartedLM.started.together.end()
    return code or _stop()


def parse_words(words: Sequence[str]) -> tuple[Settings, list[str]]:
    """Our settings, and lm-eval's words."""
    title = f"{TITLES['evaluate']} All other flags are lm-eval's: lm-eval run --help shows them."
    return parse_known_settings(PROG, title, words, without=(EvaluationSettings,))


def run_cli(words: Sequence[str], is_begun: Callable[[], bool] = lambda: True) -> int:
    """lm-eval's command line, which reads `sys.argv`; returns its exit code.

    Args:
        is_begun: whether lm-eval has asked for the model.

    Raises:
        ConfigError: its flags or task files are wrong.
    """
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm-eval", *words]
    try:
        cli_evaluate()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except (ValueError, FileNotFoundError) as error:
        if is_begun():
            raise
        # until it asks for the model, lm-eval does no more than read its flags and task files
        raise ConfigError(f"lm-eval: {str(error).rstrip('.')}; lm-eval run --help shows its flags, and python -m "
                          "modellink.evaluation.lm_eval ls tasks its tasks.") from error
    finally:
        sys.argv = before
    return 0


def _check(settings: Settings, rest: Sequence[str]) -> Run:
    """Everything that can be wrong before a tokenizer or a device is needed, in one message."""
    problems = ProblemList()
    for word in rest:
        name = word.split("=")[0]
        if name in OURS:
            problems.add(f"{name}: {OURS[name]}; leave it out.")
    for field in sorted(settings.given & {*RULES, "task", "prompt", "stop", "num_samples", "max_length"}):
        problems.add(f"--{field.replace('_', '-')}: lm-eval takes this from its tasks; use --tasks and --gen_kwargs.")
    run = problems.catch(lambda: prepare_run(settings, Rank.from_environment().world_size, "generate"))
    problems.raise_if_any()
    assert isinstance(run, Run)
    return run


def _start(run: Run, frontend: "Frontend") -> "Together":
    from modellink.start import start

    device = start(run)
    from modellink.evaluation.together import Together  # import megatron.core, which is prepared by now
    from modellink.inference.load import load_engine

    engine = load_engine(run, device)
    engine.is_interruptible = False  # Ctrl-C ends lm-eval
    return Together(engine, frontend.tokenizer)


def _stop() -> int:
    from modellink.parallel.groups import stop_groups

    stop_groups()
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
