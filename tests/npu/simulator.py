"""A simulated NPU: the real torch_npu on stub libraries, with CPU kernels behind every operator.

torch_npu's dispatcher entries, autograd nodes, allocator and streams are the true ones. Below them a dispatch mode runs
each operator by its CPU kernel on the memory of the npu tensors, which is host memory; the npu:: operators have the
kernels of `kernels.py`. A process group of gloo stands in for hccl.
"""

import ctypes
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401  # registers the device
from kernels import register_kernels
from npu_contracts import COMMUNICATORS
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map

# the allocator's and the streams' own work, which the stub runtime does
OWN = ("aten::empty.memory_format", "aten::empty_strided", "aten::empty_like", "aten::new_empty",
       "aten::new_empty_strided", "aten::record_stream", "aten::_pin_memory", "aten::is_pinned", "aten::set_",
       "aten::resize_", "aten::_reshape_alias", "aten::_unsafe_view")
# messages of each batch that a group was told to send as one
BATCHES: list[int] = []
# operators between devices
COPIES = ("aten::copy_", "aten::_copy_from", "aten::_copy_from_and_resize", "aten::set_data")
# their second argument, the list of indices, may lie on the CPU
INDEXING = ("aten::index.", "aten::index_put", "aten::_index_put_impl", "aten::_unsafe_index")


def host(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a CPU tensor; a CPU tensor is returned as it is."""
    if tensor.device.type != "npu":
        return tensor
    storage = tensor.untyped_storage()
    out = torch.empty(0, dtype=tensor.dtype)
    if storage.nbytes() == 0:
        return out.new_empty(tensor.shape)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    whole = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return out.set_(whole, tensor.storage_offset(), tensor.shape, tensor.stride())


def to_npu(tensor: torch.Tensor) -> torch.Tensor:
    """A new npu tensor of the same values and strides."""
    out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="npu")
    if tensor.numel():
        host(out).copy_(tensor)
    return out


def refuse_mixed_devices(name: str, args: Any, kwargs: Any) -> None:
    """Raise a RuntimeError, as a device does, for npu tensors beside CPU tensors; single CPU numbers are allowed.

    On the host's memory everything would compute.
    """
    if name in COPIES:
        return
    if name.startswith(INDEXING) and args[0].device.type == "npu":
        args = (args[0], *args[2:])
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    places = {tensor.device.type for tensor in tensors if tensor.dim() > 0 or tensor.device.type == "npu"}
    if {"npu", "cpu"} <= places:
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found npu and cpu")


class CpuKernels(TorchDispatchMode):
    """Runs operators on npu tensors by their CPU kernels, and refuses those that mix them with CPU tensors.

    Attributes:
        calls: how often each npu:: operator ran.
        nodes: names of the autograd nodes that called npu:: operators in a backward pass.
        operators: names of all other operators that ran on npu tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self.nodes: set[str] = set()
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.name()
        if name.startswith("c10d::") or name in OWN:
            return func(*args, **kwargs)
        if name.startswith("npu::"):
            self.calls[name] = self.calls.get(name, 0) + 1
            node = torch._C._current_autograd_node()
            if node is not None:
                self.nodes.add(node_name(node))
        elif torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"):
            with self:  # under inference_mode nothing took it apart yet
                return func.decompose(*args, **kwargs)
        elif func.is_view:
            return func(*args, **kwargs)
        refuse_mixed_devices(name, args, kwargs)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        originals: dict[int, torch.Tensor] = {}

        def lower(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.device.type == "npu":
                alias = host(value)
                originals[id(alias)] = value
                held.append(alias)
                return alias
            if isinstance(value, torch.device) and value.type == "npu":
                return torch.device("cpu")
            if isinstance(value, torch.Generator) and value.device.type == "npu":
                return torch.default_generator
            return value

        def lift(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in originals:
                return originals[id(value)]
            return to_npu(value) if on_npu and value.device.type == "cpu" else value

        held: list[torch.Tensor] = []
        device = kwargs.get("device")
        if device is not None:
            on_npu = torch.device(device).type == "npu"
        else:
            on_npu = any(leaf.device.type == "npu" for leaf in leaves)
        if on_npu and not name.startswith("npu::"):
            self.operators.add(name)
        return tree_map(lift, func(*tree_map(lower, args), **tree_map(lower, kwargs)))


class Handle:
    """A handle on one call, which the group counts as under way until somebody waits for it."""

    def __init__(self, work: Any, group: "GlooForNpu"):
        self.work, self.group = work, group
        group.awaited.add(self)

    def wait(self, *timeout: Any) -> bool:
        self.group.awaited.discard(self)
        return self.work.wait(*timeout)

    def is_completed(self) -> bool:
        return self.work.is_completed()


class Several:
    """A handle on the work of several calls."""

    def __init__(self, works: list[Any]):
        self.works = works

    def wait(self, *timeout: Any) -> bool:
        for work in self.works:
            work.wait(*timeout)
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self.works)


class GlooForNpu(dist.ProcessGroup):
    """Collectives of npu tensors over gloo on their host memory, under the names torch 2.13 calls.

    Attributes:
        options: the `pg_options` it was made with, as torch_npu's own group keeps them.
        awaited: the calls that nobody has waited for yet.
        calls: names of the calls that there were.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta, options: Any):
        super().__init__(rank, size)
        self.options = options
        self.awaited: set[Handle] = set()
        self.calls: set[str] = set()
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._under_way: list[tuple[Any, Any]] = []
        self._batch: list[Handle] | None = None

    def getBackendName(self) -> str:
        return "hccl"

    @property
    def _device_types(self) -> list[torch.device]:
        """torch sends pickled objects through tensors of this device."""
        return [torch.device("npu")]

    def _get_backend(self, device: torch.device) -> "GlooForNpu":
        return self

    def get_hccl_comm_name(self, rank: int) -> str:
        """By this name the operators of MC2 find the group."""
        name = f"simulated-{id(self)}"
        COMMUNICATORS[name] = self
        return name

    def _run(self, method: str, *arguments: Any) -> Any:
        """Call gloo with host tensors, and keep the npu tensors until the work has finished."""
        # the kernel of an operator, below the mode, communicates with host tensors
        if _get_current_dispatch_mode() is not None and any(
                isinstance(leaf, torch.Tensor) and leaf.device.type != "npu" for leaf in tree_leaves(arguments)):
            raise RuntimeError(f"{method}: hccl takes npu tensors only")
        self.calls.add(method)
        lowered = tree_map(lambda value: host(value) if isinstance(value, torch.Tensor) else value, arguments)
        work = getattr(self.gloo, method)(*(value for value in lowered if value is not None))
        self._under_way = [pair for pair in self._under_way if not pair[0].is_completed()]
        self._under_way.append((work, arguments))
        handle = Handle(work, self)
        if self._batch is not None:
            self._batch.append(handle)
        return handle

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        return self._run("allreduce", tensors, opts)

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Any:
        options = dist.AllreduceOptions()
        options.reduceOp = opts.reduceOp
        return Several([self._run("allreduce", [tensor], options) for tensor in tensors])

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        return Several([self._run("_allgather_base", *pair, opts) for pair in zip(outputs, inputs)])

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        return Several([self._run("_reduce_scatter_base", *pair, opts) for pair in zip(outputs, inputs)])

    def broadcast(self, tensors: Any, opts: Any = None) -> Any:
        return self._run("broadcast", tensors, opts)

    def reduce(self, tensors: Any, opts: Any = None) -> Any:
        return self._run("reduce", tensors, opts)

    def barrier(self, opts: Any = None) -> Any:
        # opts name the device, which gloo does not know
        return self.gloo.barrier()

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        return self._run("allgather", outputs, inputs, opts)

    def all_gather_single(self, output: Any, tensor: Any, opts: Any = None) -> Any:
        return self._run("_allgather_base", output, tensor, opts)

    def gather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        return self._run("gather", outputs, inputs, opts)

    def scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        return self._run("scatter", outputs, inputs, opts)

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        return self._run("reduce_scatter", outputs, inputs, opts)

    def reduce_scatter_single(self, output: Any, tensor: Any, opts: Any = None) -> Any:
        return self._run("_reduce_scatter_base", output, tensor, opts)

    def all_to_all_single(self, output: Any, tensor: Any, output_sizes: Any, sizes: Any, opts: Any = None) -> Any:
        return self._run("alltoall_base", output, tensor, output_sizes, sizes, opts)

    _allgather_base, _reduce_scatter_base, alltoall_base = all_gather_single, reduce_scatter_single, all_to_all_single

    def send(self, tensors: Any, peer: int, tag: int) -> Any:
        return self._run("send", tensors, peer, tag)

    def recv(self, tensors: Any, peer: int, tag: int) -> Any:
        return self._run("recv", tensors, peer, tag)

    def _start_coalescing(self, device: torch.device) -> None:
        """From here on calls belong to a batch, for which `_end_coalescing` gives one handle."""
        self._batch = []

    def _end_coalescing(self, device: torch.device) -> Several:
        works, self._batch = self._batch or [], None
        BATCHES.append(len(works))
        return Several(works)

    def batch_isend_irecv(self, kinds: list[str], tensors: list[torch.Tensor], peers: list[int]) -> Any:
        """torch_npu's own call behind dist.batch_isend_irecv."""
        methods = {"isend": "send", "irecv": "recv"}
        return Several([self._run(methods[kind], [tensor], peer, 0)
                        for kind, tensor, peer in zip(kinds, tensors, peers)])


@contextmanager
def cann_9() -> Iterator[None]:
    """Inside the block torch_npu takes the stub runtime for a CANN from 9.0 on, of which it reads the version once."""
    from torch_npu.distributed import distributed_c10d

    before, distributed_c10d._CANN_VERSION = distributed_c10d._CANN_VERSION, True
    try:
        yield
    finally:
        distributed_c10d._CANN_VERSION = before


def _make_group(asked: Any, options: Any) -> dist.ProcessGroup:
    return GlooForNpu(asked.store, asked.group_rank, asked.group_size, asked.timeout, options)


@contextmanager
def simulated_npu() -> Iterator[CpuKernels]:
    """Inside the block npu tensors compute, and `init_process_group("hccl")` gives gloo. Once a process."""
    register_kernels()
    dist.Backend._plugins["HCCL"] = dist.Backend._BackendPlugin(_make_group, True)
    with CpuKernels() as kernels:
        yield kernels


def node_name(node: Any) -> str:
    """Name of an autograd node; the context of a Python function may have a `name` of its own."""
    return node.name() if callable(node.name) else type(node).__name__


def autograd_nodes(*outputs: torch.Tensor) -> set[str]:
    """Names of all nodes in the graphs behind tensors."""
    seen: set[Any] = set()
    waiting = [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in itertools.chain(node.next_functions)]
    return {node_name(node) for node in seen}
