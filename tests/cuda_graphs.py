"""torch.cuda's graphs and streams for CPU tensors, with the rules that torch documents for them.

Recording writes down the aten operators of a function and the tensors they had; a replay runs these operators, and no
Python of the function, on those tensors. An operator that depended on a value at the time of recording (a length, a
row, a place) would go on using it. As on a GPU, recording computes nothing that may be used, graphs of one pool write
over each other's memory (here with NaN and absurd numbers), a function warms up beforehand on the stream that records
it, and a look at a value while recording is an error.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LOOKS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")


class Stream:
    """Who waited for whom, and whether work was put on it."""

    def __init__(self) -> None:
        self.waited_for: list[Stream] = []
        self.was_used = False

    def wait_stream(self, other: "Stream") -> None:
        self.waited_for.append(other)


class Graph(TorchDispatchMode):
    """A recording: the operators, their arguments, and the tensors they made."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []
        self.pool: Pool | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name() not in LOOKS, f"{func.name()} looks at a value while a graph is recorded"
        kwargs = kwargs or {}
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **kwargs)
        made = [(place, leaf) for place, leaf in enumerate(tree_leaves(result))
                if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given]
        self.nodes.append((func, args, kwargs, made))
        return result

    def replay(self) -> None:
        assert self.pool is not None
        LAUNCHES.append(len(self.nodes))
        if self.pool.last is not self:
            self.pool.overwrite()
        self.pool.last = self
        with torch.inference_mode():
            for func, args, kwargs, made in self.nodes:
                found = tree_leaves(func(*args, **kwargs))
                for place, tensor in made:
                    tensor.copy_(found[place])


class Pool:
    """Memory of some graphs; only what the last one made can be read."""

    def __init__(self) -> None:
        self.last: Graph | None = None
        self.stream: Stream | None = None
        POOLS.append(self)

    def overwrite(self) -> None:
        with torch.inference_mode():
            for tensor in [tensor for node in (self.last.nodes if self.last else []) for _, tensor in node[3]]:
                tensor.fill_(torch.nan if tensor.is_floating_point() else tensor.dtype == torch.bool or 99)


LAUNCHES: list[int] = []  # operators of each launch
RECORDED: list[int] = []  # operators of each recording
POOLS: list[Pool] = []


@contextmanager
def graphs_on_cpu() -> Iterator[None]:
    """Inside the block torch.cuda records and launches graphs of CPU tensors; the lists above start empty."""
    main = Stream()
    current = [main]

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        current.append(chosen)
        chosen.was_used = True
        yield
        current.pop()

    @contextmanager
    def graph(recording: Graph, pool: Pool, stream: Stream) -> Iterator[None]:
        assert stream.was_used and main in stream.waited_for and stream in main.waited_for, "it did not warm up"
        assert pool.stream in (None, stream), "graphs of a pool are recorded on one stream"
        if pool.last is not None:  # recording takes what no graph of the pool needs any more
            pool.overwrite()
        with recording:
            yield
        recording.pool, pool.stream, pool.last = pool, stream, recording
        pool.overwrite()  # nothing has run yet
        RECORDED.append(len(recording.nodes))

    stand_ins = {"CUDAGraph": Graph, "graph": graph, "Stream": Stream, "stream": stream,
                 "current_stream": lambda: current[-1], "graph_pool_handle": Pool}
    for part in (LAUNCHES, RECORDED, POOLS):
        part.clear()
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(patch.object(torch.cuda, name, stand_in))
        yield
