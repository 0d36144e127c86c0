"""Post-train Qwen1.5: `--stage sft` on instruction samples, `--stage dpo` on preference pairs."""

import os
import sys
from collections.abc import Sequence

# torch would otherwise import every accelerator plug-in it finds; modellink imports the one that is chosen
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

from modellink.config import ConfigError, run_command  # noqa: E402
from modellink.config.settings import parse_settings  # noqa: E402
from modellink.runtime import TITLES  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Check that a stage was named, then do what pretrain_gpt.py does. Returns the exit code."""
    import pretrain_gpt

    if parse_settings("posttrain_gpt.py", TITLES["train"], argv).post.stage is None:
        raise ConfigError("--stage is missing: give --stage sft for instruction samples or --stage dpo for preference "
                          "pairs.")
    return pretrain_gpt.main(argv)


if __name__ == "__main__":
    sys.exit(run_command(main))
