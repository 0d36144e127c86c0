"""Convert Qwen1.5 weights between HF folders and Megatron checkpoints; see --help."""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone works without being installed

from modellink.checkpoint.convert import main  # noqa: E402
from modellink.config import run_command  # noqa: E402

if __name__ == "__main__":
    # an ended job unwinds, so that its unfinished folder is removed
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(run_command(main))
