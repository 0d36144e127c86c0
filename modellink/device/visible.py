"""Why a device that is installed cannot be used: visibility, and another accelerator in the same torch."""

import os
from collections.abc import Mapping

import torch


def setting_of(variable: str, environment: Mapping[str, str] = os.environ) -> str:
    """`VARIABLE is set to 'value'`; empty when it is unset."""
    return f"{variable} is set to '{environment[variable]}'" if variable in environment else ""


def visibility_problem(variable: str, environment: Mapping[str, str] = os.environ, *, ascending: bool = False,
                       ) -> str | None:
    """What is wrong with the variable that says which devices a process sees; None when nothing is, or it is unset.

    Args:
        variable: its name.
        environment: where to read it.
        ascending: ids must be numbers in rising order without spaces (Ascend).
    """
    value = environment.get(variable)
    if value is None:
        return None
    if value.strip() in ("", "-1", "NoDevFiles"):
        return f"{setting_of(variable, environment)}, which hides every device; unset it or name the devices to use"
    if not ascending:
        return None
    ids = value.split(",")
    if not all(word.isdigit() for word in ids) or [int(word) for word in ids] != sorted({int(word) for word in ids}):
        return (f"{setting_of(variable, environment)}, but must be device numbers in rising order with commas and no "
                "spaces between them, for example 0,1,2; correct or unset it")
    return None


def other_accelerator(name: str) -> str | None:
    """The accelerator that this process's torch already works with, when it is not the one called `name`."""
    current = torch.accelerator.current_accelerator(check_available=True)
    return None if current is None or current.type == name else current.type
