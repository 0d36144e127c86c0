"""Signals: a request to stop is kept until the step is finished."""

import signal
from types import FrameType


class StopRequest:
    """Set by SIGTERM: the run saves after the current step and exits."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
