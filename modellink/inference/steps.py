"""Steps of generation that are recorded once and launched again as a whole (CUDA graphs).

A step of a small batch is some hundred kernels of microseconds each; launching them one by one takes longer than they
run. A recording has fixed shapes and fixed places in memory: tokens and positions are one tensor, which the host fills
before a launch, and attention reads a rounded number of tokens of each row, with a mask that the recording makes from
the positions.

Import this module only after the device was chosen (`modellink.start`): it imports megatron.core.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from modellink.device.copies import queued_copy
from modellink.inference.cache import KVCache
from modellink.inference.forward import Stage

# what records the kernels of a function; the result launches them again and gives the tensor that they fill, which
# holds until anything recorded by the same is launched
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
Recorder = Callable[[], Capture]  # what is recorded by one capture shares memory
READ_TOGETHER = 256  # tokens by which the part of a row that is read grows
# steps of the same shape in a row: recording runs some, and lets go of memory that later passes ask the driver for
WORTH_RECORDING = 16
MOST_RECORDINGS = 16


class _Step:
    """One recording: so many rows, of which so many tokens are read."""

    def __init__(self, stage: Stage, cache: KVCache, count: int, end: int, capture: Capture):
        # not of self: in a circle of references they would stay in memory until Python looks for circles
        inputs = torch.zeros(2, count, dtype=torch.int64, device=stage.device)
        tokens, positions = inputs
        # held by `run`: the model replaces its table by a larger one, and a recording reads where the old one lay
        table = stage.rotary_table(cache)

        def run() -> Tensor:
            cache.place_step(positions, end)
            return stage.step(cache, tokens, table)

        self._inputs, self._run, self._capture = inputs, run, capture
        self._launch: Callable[[], Tensor] | None = None

    def __call__(self, tokens: list[int], positions: list[int]) -> Tensor:
        self._inputs.copy_(queued_copy(torch.tensor([tokens, positions]), self._inputs.device))
        if self._launch is None:  # with true tokens and positions: recording may run the step, and it writes keys
            self._launch = self._capture(self._run)
        return self._launch().clone()  # the next launch, of any recording, writes where this one's result lies


class CapturedSteps:
    """The recordings of a stage, made when a shape comes up often enough."""

    def __init__(self, stage: Stage, recorder: Recorder):
        self._stage = stage
        self._recorder = recorder
        self._capture: Capture | None = None
        self._cache: KVCache | None = None
        self._recorded: dict[tuple[int, int], _Step] = {}
        self._last: tuple[int, int] = (0, 0)
        self._times = 0

    def forget(self) -> None:
        """Let go of all recordings, of their memory and of the cache that they hold."""
        self._recorded.clear()
        self._cache, self._capture, self._times = None, None, 0

    def run(self, cache: KVCache, tokens: list[int]) -> Tensor | None:
        """The step that `cache.begin` was told of, from a recording; None when there is none yet.

        Returns:
            [rows, hidden size], as of `Stage.forward`.
        """
        if cache is not self._cache:  # recordings know places in the memory of the old one
            self.forget()
            self._cache = cache
        shape = (len(tokens), min(-(-cache.longest // READ_TOGETHER) * READ_TOGETHER, cache.length))
        self._times = self._times + 1 if shape == self._last else 1
        self._last = shape
        step = self._recorded.pop(shape, None)
        if step is None:
            if self._times < WORTH_RECORDING:
                return None
            if len(self._recorded) == MOST_RECORDINGS:
                del self._recorded[next(iter(self._recorded))]
            self._capture = self._capture or self._recorder()
            step = _Step(self._stage, cache, *shape, self._capture)
        self._recorded[shape] = step  # the last one used comes last
        hidden = step(tokens, cache.starts)
        cache.end()
        return hidden
