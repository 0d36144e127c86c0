"""A host with numbers beside fake cuda tensors, and a list of the moments at which it waits for the device.

Import it after `fake_cuda.load`.
"""

import sys
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten, c10d = torch.ops.aten, torch.ops.c10d
SOURCES = ("modellink/", "megatron/core/")  # whose functions are named
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class HostLooks(TorchDispatchMode):
    """Runs what concerns CPU tensors alone for real, and writes down every look of the host at the device.

    Enter it inside FakeTensorMode. A number that the host reads from the device is 1.

    Attributes:
        seen: (kind, file and function) in order. `read`: a value or a tensor comes from the device, which the host
            waits for. `upload`: a tensor of the host goes to the device; its memory is pageable, so the host waits
            until all work before it is done. `send`: the same without waiting.
        operators: names of all operators that ran on cuda tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []
        self.operators: set[str] = set()

    def clear(self) -> None:
        """Forget what was seen so far."""
        self.seen.clear()
        self.operators.clear()

    def report(self) -> list[tuple[str, str]]:
        """`seen`, where neighbours that are the same count once: a list is read value by value here, at once there."""
        return [look for look, _ in groupby(self.seen)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "prim":  # asks a tensor for its device
            return func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        is_there = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if func.name() in ("aten::pin_memory", "aten::_pin_memory"):  # needs a GPU's driver; the host's work alone
            with unset_fake_temporarily():
                return args[0].clone()
        if not is_there and not any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # under inference_mode nothing took it apart yet
                return func.decompose(*args, **kwargs)
        self.operators.add(func.name())
        if func is c10d.allreduce_coalesced_.default:  # torch has no shape function of this one
            return c10d.allreduce_.default(*args[:3], None)[1]
        if func is aten._local_scalar_dense.default:
            self._see("read")
            with unset_fake_temporarily():
                return torch.ones((), dtype=args[0].dtype).item()
        if func is aten._to_copy.default and is_there and kwargs.get("device", args[0].device).type == "cpu":
            self._see("read")
            with unset_fake_temporarily():
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            self._see("read")
            with unset_fake_temporarily():
                return args[0].fill_(1)
        if func in (aten._to_copy.default, aten.copy_.default):
            if any(not isinstance(tensor, FakeTensor) and tensor.numel() for tensor in tensors):
                self._see("send" if kwargs.get("non_blocking") or args[2:] == (True,) else "upload")
        elif func in INDEXING and any(isinstance(i, Tensor) and not isinstance(i, FakeTensor) for i in args[1]):
            self._see("upload")
        return func(*args, **kwargs)

    def _see(self, kind: str) -> None:
        frame: Any = sys._getframe(2)
        while frame is not None:
            path = frame.f_code.co_filename
            for source in SOURCES:
                if f"/{source}" in path:
                    name = source + path.rpartition(f"/{source}")[2]
                    self.seen.append((kind, f"{name} {frame.f_code.co_name}"))
                    return
            frame = frame.f_back
        self.seen.append((kind, "elsewhere"))
