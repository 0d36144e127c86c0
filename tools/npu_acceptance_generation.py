"""What the small model of npu_acceptance.py generates on a device, in every precision.

`python npu_acceptance_generation.py --load FOLDER --file ANSWERS.jsonl --device npu` writes a line for each precision
as soon as it is known: {"precision": ..., "logits": {case: [[...]]}, "words": [[...]]}, or {"precision": ...,
"failure": ...} for one that broke. The words behind which logits are asked for are given, so that devices can be
compared place by place; `words` are greedy answers.
"""

import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

from npu_acceptance_rows import Failure  # noqa: E402

from modellink.config.errors import ConfigError, run_command  # noqa: E402
from modellink.config.fields import flag  # noqa: E402
from modellink.config.parser import parse_sections  # noqa: E402

PROMPTS, STEPS, BEHIND = (37, 5, 81), 8, 11  # tokens of the prompts, steps, tokens that come behind the first prompt
LENGTH = 256  # of the cache's rows, more than is used


@dataclass(frozen=True)
class Options:
    """Generation of the acceptance."""

    load: str = flag("small", "folder of the model")
    file: str = flag("answers.jsonl", "where the answers go")
    device: str = flag("npu", "device to look at", choices=["npu", "cuda", "cpu"])


def main(argv: Sequence[str] | None = None) -> int:
    """Generate in every precision and write the answers."""
    (options,), _ = parse_sections("npu_acceptance_generation.py", "A part of npu_acceptance.py.", (Options,), argv)
    from modellink.config.settings import parse_settings
    from modellink.ops.forms import DTYPES
    from modellink.parallel.groups import stop_groups
    from modellink.runtime import prepare_run
    from modellink.start import start

    words = ["--load", options.load, "--tokenizer-name-or-path", options.load, "--device", options.device]
    runs = {precision: prepare_run(parse_settings("npu_acceptance_generation.py", "", [*words, f"--{precision}"]), 1,
                                   "generate") for precision in DTYPES}
    device = start(next(iter(runs.values())))
    with open(options.file, "w", encoding="utf-8", buffering=1) as file:
        for precision, run in runs.items():
            print(precision, flush=True)  # a kernel may take the process with it: then the log ends here
            try:
                answers = generated(run, device)
            # a kernel that refuses, that this library does not have, or that our own limits rule out
            except (RuntimeError, AttributeError, ConfigError) as error:
                answers = {"failure": asdict(Failure.of(error))}
            file.write(json.dumps({"precision": precision, **answers}) + "\n")
    stop_groups()
    return 0


def generated(run: Any, device: Any) -> dict[str, Any]:
    """Logits of given words, in prompts of different lengths, behind one of them and in steps; and greedy answers."""
    from modellink.inference.cache import Piece
    from modellink.inference.load import load_engine
    from modellink.inference.request import Request, SamplingSettings

    draw = random.Random(5)

    def words(count: int) -> list[int]:
        return [draw.randrange(1, run.model.vocab_size) for _ in range(count)]

    prompts = [words(count) for count in PROMPTS]
    behind, steps = words(BEHIND), [[words(1) for _ in PROMPTS] for _ in range(STEPS)]
    engine = load_engine(run, device, prefix_reuse=False)
    replica = engine.replica
    cache = replica.reserve(len(prompts), LENGTH)

    def logits(new: list[list[int]]) -> list[list[float]]:
        """Behind the last new word of each of the first rows, in one pass."""
        ends = [sum(map(len, new[:count + 1])) - 1 for count in range(len(new))]
        hidden = replica.run(cache, [Piece(row, len(cache.tokens[row]), tokens) for row, tokens in enumerate(new)],
                             ends)
        assert hidden is not None, "one rank has all layers"
        return replica.logits(hidden).tolist()

    cases = {f"prompts of {', '.join(map(str, PROMPTS))}": logits(prompts),
             f"{BEHIND} words behind a prompt of {PROMPTS[0]}": logits([behind]),
             f"{STEPS} steps of rows of different lengths": [row for new in steps for row in logits(new)]}
    settings = SamplingSettings(max_new_tokens=2 * STEPS)
    answers = engine.generate([Request(prompt, settings) for prompt in prompts])
    return {"logits": cases, "words": [answer.tokens for answer in answers]}


if __name__ == "__main__":
    sys.exit(run_command(main))
