#!/usr/bin/env python3
"""Tokenize text files for training; see `tools/preprocess_data.py --help`."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # tokenizing needs no accelerator
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modellink.config.errors import run_command  # noqa: E402
from modellink.data.preprocess import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_command(main))
