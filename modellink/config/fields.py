"""`flag()`: a dataclass field that is also a command-line option, with its help text beside it."""

import dataclasses
from collections.abc import Sequence
from typing import Any


def flag(
    default: Any,
    help: str,
    *,
    names: Sequence[str] = (),
    off_names: Sequence[str] = (),
    choices: Sequence[str] | None = None,
    nargs: str | int | None = None,
    type: type | None = None,
    metavar: str | None = None,
    switches: dict[str, str] | None = None,
) -> Any:
    """Declare one setting.

    The option's name is the field's name with dashes. A boolean field also gets its `--no-` form.

    Args:
        default: value when the option is not given; a list default is copied.
        help: the help text, one sentence.
        names: further names of the option (for a boolean: names that switch it on).
        off_names: further names that switch a boolean off.
        choices: allowed values.
        nargs: as in argparse; `"flag"` does not exist here, a boolean default makes a switch.
        type: value type when the default does not tell it (for `None` defaults).
        metavar: placeholder in the help text.
        switches: options without a value, each of which sets the field to a constant (the last one given counts);
            they replace the option named after the field.
    """
    metadata = {
        "help": help,
        "names": tuple(names),
        "off_names": tuple(off_names),
        "choices": choices,
        "nargs": nargs,
        "type": type,
        "metavar": metavar,
        "switches": switches,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
