"""The protocol of a device, which every other room talks to instead of a vendor's module."""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from modellink.device.options import DeviceOptions


class Device(Protocol):
    """One kind of accelerator, seen from one rank.

    Attributes:
        name: `cpu`, `cuda` or `npu`; also torch's device type.
        backend: torch.distributed backend for tensors on this device.
        namespace: the module that plays the part of `torch.cuda` for megatron-core on this device.
        graph_recorder: makes what records the kernels that a function launches and launches them again as a whole
            (`GraphCapture` of cuda.py); None on a device that has nothing like it.
    """

    name: str
    backend: str
    namespace: Any
    graph_recorder: Callable[[], Any] | None

    def unusable_reason(self) -> str | None:
        """None when the device can be used here, otherwise one sentence why not."""

    def prepare(self, options: DeviceOptions) -> None:
        """Set what the device's libraries read when they start; called once, before `set_current`.

        Raises:
            ConfigError: the environment contradicts an option.
        """

    def group_options(self, group: str) -> Any:
        """What torch.distributed gets as `pg_options` of a group (megatron-core's name of it, or `world`)."""

    def vary_lengths(self) -> None:
        """From now on attention sees samples of many lengths: no kernel that is planned anew for each."""

    def profiler(self) -> Any:
        """A recorder of the work on this device, not started: `start`, `stop`, `export_chrome_trace(path)`."""

    def set_current(self, local_rank: int) -> torch.device:
        """Bind this process to the accelerator of its local rank and return it."""

    def current(self) -> torch.device:
        """The device tensors of this rank live on."""

    def count(self) -> int:
        """Accelerators visible to this process (a CPU counts once)."""

    def synchronize(self) -> None:
        """Wait for the work queued on the device."""

    def free_memory(self) -> int:
        """Bytes that can still be allocated (host memory on cpu)."""

    def peak_memory(self) -> int:
        """Largest number of bytes this process held, in bytes."""

    def product_name(self) -> str:
        """The vendor's name of the device, for the table of peak rates; 'cpu' on a CPU."""

    def rng_state(self) -> torch.Tensor:
        """State of the device's default generator, a uint8 CPU tensor."""

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Restore a state from `rng_state`."""

    def libraries(self) -> dict[str, str]:
        """Driver and library versions for `modellink doctor`."""
