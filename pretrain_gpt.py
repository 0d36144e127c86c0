"""Pretrain Qwen1.5: `python pretrain_gpt.py ...`, `modellink launch ... pretrain_gpt.py ...` or `torchrun ...`."""

import os
import sys
from collections.abc import Sequence

# torch would otherwise import every accelerator plug-in it finds; modellink imports the one that is chosen
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

from modellink.config import run_command  # noqa: E402
from modellink.config.settings import parse_settings  # noqa: E402
from modellink.parallel.rank import Rank  # noqa: E402
from modellink.runtime import TITLES, prepare_run  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Check, start this rank, train. Returns the exit code."""
    settings = parse_settings("pretrain_gpt.py", TITLES["train"], argv)
    run = prepare_run(settings, Rank.from_environment().world_size, "train")
    from modellink.device.options import refusals_explained
    from modellink.parallel.groups import stop_groups
    from modellink.start import start

    device = start(run)
    from modellink.training.loop import train

    with refusals_explained():
        train(run, device)
    stop_groups()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
