"""Ascend NPUs through torch_npu and hccl; torch_npu is imported only when this device is asked for or probed."""

import importlib
import importlib.util
import os
from typing import Any

import torch

from modellink.device.options import DeviceOptions, make_deterministic
from modellink.device.visible import other_accelerator, visibility_problem

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"
# collectives of HCCL and LCCL, and matrix products of CANN and ATB, that add up in a fixed order: CANN's pages of
# HCCL_DETERMINISTIC; the other names as the Ascend projects (vllm-ascend, msprobe) set them for reproducible results
DETERMINISTIC = {"HCCL_DETERMINISTIC": ("true", "strict"), "LCCL_DETERMINISTIC": ("1", "true"),
                 "CLOSE_MATMUL_K_SHIFT": ("1",), "ATB_MATMUL_SHUFFLE_K_ENABLE": ("0",), "ATB_LLM_LCOC_ENABLE": ("0",)}
# seconds that CANN allows: its pages of HCCL_CONNECT_TIMEOUT and HCCL_EXEC_TIMEOUT
TIMEOUTS = {"HCCL_CONNECT_TIMEOUT": (120, 7200), "HCCL_EXEC_TIMEOUT": (68, 17340)}


class NpuDevice:
    """One Ascend NPU per rank."""

    name = "npu"
    backend = "hccl"
    graph_recorder = None

    def __init__(self) -> None:
        self._module: Any = None
        self._reason: str | None = None
        self._options = DeviceOptions()

    @property
    def namespace(self) -> Any:
        """`torch.npu`, after importing torch_npu."""
        self._load()
        return torch.npu  # type: ignore[attr-defined]

    def _load(self) -> None:
        if self._module is not None or self._reason is not None:
            return
        other = other_accelerator(self.name)
        if other is not None:
            self._reason = (f"this torch works with {other} (torch.accelerator.current_accelerator()), and torch_npu "
                            f"needs a torch without another accelerator; install torch's build for the CPU in an "
                            f"environment of its own, or hide {other}")
        elif importlib.util.find_spec("torch_npu") is None:
            self._reason = "torch_npu is not installed; pip install 'modellink[npu]'"
        else:
            # the runtime reads it once, and is silent about what it cannot read
            self._reason = visibility_problem(VISIBLE, ascending=True)
        if self._reason is not None:
            return
        try:
            self._module = importlib.import_module("torch_npu")
        except (ImportError, RuntimeError, OSError) as error:
            # the wheel links the CANN libraries: without a CANN installation the import itself fails
            advice = ("compare the versions of torch, torch-npu and CANN with torch-npu's release table"
                      if os.environ.get("ASCEND_HOME_PATH") else "source CANN's set_env.sh first")
            self._reason = f"torch_npu cannot be imported ({error}); {advice}"

    def unusable_reason(self) -> str | None:
        self._load()
        if self._reason is None and not self.namespace.is_available():
            return f"torch_npu sees no usable NPU; check npu-smi info and {VISIBLE}"
        return self._reason

    def prepare(self, options: DeviceOptions) -> None:
        self._options = options
        for name, (least, most) in TIMEOUTS.items():
            os.environ.setdefault(name, str(min(max(60 * options.timeout_minutes, least), most)))
        if options.deterministic:
            make_deterministic(DETERMINISTIC)

    def group_options(self, group: str) -> Any:
        size = self._options.buffers.asked(group)
        if size is None:
            return None
        from torch_npu._C._distributed_c10d import ProcessGroupHCCL

        options = ProcessGroupHCCL.Options()
        options.hccl_config = {"hccl_buffer_size": size}
        return options

    def vary_lengths(self) -> None:
        pass

    def profiler(self) -> Any:
        self._load()
        return self._module.profiler.profile()

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
        # all NPUs of a machine are of one kind; asked without a number, torch_npu would start the first one
        return self.namespace.get_device_name(0)

    def rng_state(self) -> torch.Tensor:
        return self.namespace.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.namespace.set_rng_state(state)

    def libraries(self) -> dict[str, str]:
        self._load()
        # torch_npu finds them through ASCEND_HOME_PATH, which set_env.sh sets
        versions = {name: self.namespace.utils.get_cann_version(module) or "unknown"
                    for name, module in (("driver", "DRIVER"), ("CANN", "CANN"))}
        return {**versions, "torch": torch.__version__, "torch_npu": getattr(self._module, "__version__", "n/a")}
