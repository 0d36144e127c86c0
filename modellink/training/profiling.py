"""`--profile`: a trace of some steps of some ranks, written whole when the last of them is done."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import record_function

from modellink.config.errors import ConfigError
from modellink.config.files import write_beside
from modellink.config.settings import ProfileSettings
from modellink.device.base import Device


class StepProfiler:
    """Records the steps after `--profile-step-start` up to `--profile-step-end` when this rank is one of those asked.

    Args:
        settings: which steps and ranks, and the folder.
        device: its profiler records.
        rank: this process.
    """

    def __init__(self, settings: ProfileSettings, device: Device, rank: int):
        self.device = device
        self.rank = rank
        self.folder = Path(settings.profile_dir)
        is_asked = settings.profile and rank in (settings.profile_ranks or [0])
        self._steps = range(settings.profile_step_start + 1, settings.profile_step_end + 1) if is_asked else range(0)
        self._recorder: Any = None
        self._recorded: list[int] = []

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """The block is step `number`, from 1; it stands in the trace under this name."""
        if number not in self._steps:
            yield
            return
        if self._recorder is None:
            self.device.synchronize()  # nothing of the step before may reach into the trace
            self._recorder = self.device.profiler()
            self._recorder.start()
        with record_function(f"step {number}"):
            yield
        self._recorded.append(number)
        if number == self._steps[-1]:
            self._write()

    def close(self) -> None:
        """Write the trace of a run that ended within the range, and say so when a run never came to it."""
        if self._recorder is not None:
            self._write()
        elif self._steps and not self._recorded:
            print(f"--profile recorded nothing: the run took no step from {self._steps[0]} to {self._steps[-1]}",
                  flush=True)

    def _write(self) -> None:
        self.device.synchronize()
        self._recorder.stop()
        first, last = self._recorded[0], self._recorded[-1]
        target = self.folder / f"rank_{self.rank}.steps_{first}-{last}.json"
        with write_beside(target) as beside:
            self._recorder.export_chrome_trace(str(beside))
            if not beside.is_file():  # torch_npu's profiler prints its errors and goes on
                raise ConfigError(f"--profile: the profiler of {self.device.name} wrote no trace of steps {first} to "
                                  f"{last}; what it printed above says why; leave --profile out to go on without.")
        self._recorder = None
        print(f"wrote the trace of steps {first} to {last} of rank {self.rank} to {target}", flush=True)
