"""Compilers that a library starts while a program runs."""

import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path


@functools.cache
def triton_missing() -> str | None:
    """None when Triton can compile kernels here, otherwise a few words why not and what to do."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'modellink[cuda]'"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton finds no C compiler to start its kernels with; install gcc or name one with CC"
    return python_headers_missing()


def python_headers_missing() -> str | None:
    """None when extensions of this Python can be compiled, otherwise a few words why not and what to do."""
    if (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return None
    return "the header files of Python are missing; install python3-dev"
