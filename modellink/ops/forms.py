"""Which form of each operation runs: chosen once for a run, looked up by the device of the tensors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}



def name_of_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Situation:
    """What the choice of forms depends on; the defaults are those of Qwen1.5-7B in bf16 on one rank.

    Attributes:
        device: `cpu`, `cuda` or `npu`.
        product: the vendor's name of the device.
        dtype: of weights and activations.
        head_dim: elements of an attention head.
        heads, groups: query heads and key/value groups of one tensor parallel rank.
        hidden, ffn: features of a hidden state, and of the gated activation on one tensor parallel rank.
        widths: input features of the tensor parallel linear layers on one rank.
        tensor: tensor parallel ranks.
        is_sequence_parallel: the sequence is split between the layers of these ranks.
        node_ranks: ranks on this node, 0 when not known.
        has_adapters: the linear layers carry LoRA adapters.
        wishes: the names of the kernel flags that were switched on.
    """

    device: str
    product: str = ""
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    heads: int = 32
    groups: int = 32
    hidden: int = 4096
    ffn: int = 11008
    widths: tuple[int, ...] = (4096, 11008)
    tensor: int = 1
    is_sequence_parallel: bool = False
    node_ranks: int = 0
    has_adapters: bool = False
    wishes: frozenset[str] = field(default=frozenset())


def _always(situation: Situation) -> str | None:
    return None


@dataclass(frozen=True)
class Form:
    """One way to compute an operation.

    Attributes:
        name: what doctor and the log call it.
        run: the function, with the arguments that all forms of the operation share; None where megatron-core's own
            layer does the work.
        devices: where it can run; empty: everywhere.
        why_not: None when it can be used in a situation on these devices, otherwise a few words why not.
    """

    name: str
    run: Callable[..., Any] | None
    devices: tuple[str, ...] = ()
    why_not: Callable[[Situation], str | None] = _always

    def is_for(self, device: str) -> bool:
        """Whether it is a form of this device at all."""
        return not self.devices or device in self.devices


@dataclass(frozen=True)
class Choice:
    """The form of one operation, and why those before it were passed over: (name, reason) pairs."""

    operation: str
    form: Form
    passed: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in self.passed)
        return f"{self.operation}: {self.form.name}" + (f" ({reasons})" if reasons else "")


# (device type of the tensors, operation) -> function
_in_use: dict[tuple[str, str], Callable[..., Any]] = {}


def use_forms(choices: Sequence[Choice], device_type: str) -> None:
    """From now on operations on tensors of this device type run in the chosen forms; others keep their own."""
    for key in [key for key in _in_use if key[0] == device_type]:
        del _in_use[key]
    _in_use.update({(device_type, choice.operation): choice.form.run for choice in choices
                    if choice.form.run is not None})


@contextmanager
def forms_in_use(choices: Sequence[Choice], device_type: str) -> Iterator[None]:
    """`use_forms` for the time of the block."""
    before = dict(_in_use)
    use_forms(choices, device_type)
    try:
        yield
    finally:
        _in_use.clear()
        _in_use.update(before)


def form_of(operation: str, device_type: str, portable: Callable[..., Any]) -> Callable[..., Any]:
    """The chosen function of an operation; `portable` where nothing was chosen (conversion, proofs, tests)."""
    return _in_use.get((device_type, operation), portable)


def chosen(operation: str, device_type: str) -> Callable[..., Any] | None:
    """The chosen function of an operation; None where megatron-core's own layer does the work."""
    return _in_use.get((device_type, operation))
