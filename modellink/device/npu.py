"""Ascend NPUs through torch_npu and hccl; torch_npu is imported only when this device is asked for or probed."""

import importlib
import importlib.util
from typing import Any

import torch


class NpuDevice:
    """One Ascend NPU per rank."""

    name = "npu"
    backend = "hccl"

    def __init__(self) -> None:
        self._module: Any = None
        self._reason: str | None = None

    @property
    def namespace(self) -> Any:
        """`torch.npu`, after importing torch_npu."""
        self._load()
        return torch.npu  # type: ignore[attr-defined]

    def _load(self) -> None:
        if self._module is not None or self._reason is not None:
            return
        if importlib.util.find_spec("torch_npu") is None:
            self._reason = "torch_npu is not installed; pip install 'modellink[npu]'"
            return
        try:
            self._module = importlib.import_module("torch_npu")
        except (ImportError, RuntimeError, OSError) as error:
            # the wheel links the CANN libraries: without a CANN installation the import itself fails
            self._reason = f"torch_npu cannot be imported ({error}); source CANN's set_env.sh first"

    def unusable_reason(self) -> str | None:
        self._load()
        if self._reason is None and not self.namespace.is_available():
            return "torch_npu sees no usable NPU; check npu-smi info and ASCEND_RT_VISIBLE_DEVICES"
        return self._reason

    def set_current(self, local_rank: int) -> torch.device:
        self.namespace.set_device(local_rank)
        # private formats would be written into checkpoints and break views
        self.namespace.config.allow_internal_format = False
        return torch.device("npu", local_rank)

    def current(self) -> torch.device:
        return torch.device("npu", self.namespace.current_device())

    def count(self) -> int:
        return self.namespace.device_count()

    def synchronize(self) -> None:
        self.namespace.synchronize()

    def free_memory(self) -> int:
        return self.namespace.mem_get_info()[0]

    def peak_memory(self) -> int:
        return self.namespace.max_memory_allocated()

    def product_name(self) -> str:
        return self.namespace.get_device_name()

    def rng_state(self) -> torch.Tensor:
        return self.namespace.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.namespace.set_rng_state(state)

    def libraries(self) -> dict[str, str]:
        self._load()
        return {"torch": torch.__version__, "torch_npu": getattr(self._module, "__version__", "n/a")}
