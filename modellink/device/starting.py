"""An accelerator that is counted but does not start: one sentence, whoever asked it first."""

from collections.abc import Iterator
from contextlib import contextmanager

from modellink.config.errors import ConfigError
from modellink.device.backends import first_words

ADVICE = "another process may hold it: look at the vendor's tool, or make other devices visible"


@contextmanager
def reporting_device(name: str, where: str = "") -> Iterator[None]:
    """Around the first thing that is asked of an accelerator, with which its driver starts.

    Args:
        name: of the device, with its number where it is known.
        where: behind `does not start`, such as ` on rank 1`.

    Raises:
        ConfigError: the driver raised an error.
    """
    try:
        yield
    except RuntimeError as error:
        raise ConfigError(f"{name} does not start{where}: {first_words(error)}; {ADVICE}.") from error
