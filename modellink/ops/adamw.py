"""AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101) in the form megatron-core expects."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from modellink.ops.forms import form_of

MOMENTS = ("exp_avg", "exp_avg_sq")  # of gradients and of their squares


def adamw(parameters: list[Tensor], grads: list[Tensor], means: list[Tensor], squares: list[Tensor], *, step: int,
          lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """One step, in place.

    Args:
        parameters, grads: of one dtype and device.
        means, squares: running means of gradients and of their squares.
        step: counted from 1.

    A step with gradients that are not finite must be left out before: megatron-core unscales, looks for them and skips.
    Fused kernels take `grad_scale` and `found_inf` to do it themselves, but the NPU's ignores both.
    """
    form = form_of("adamw", parameters[0].device.type, torch_adamw)
    form(parameters, grads, means, squares, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def torch_adamw(parameters: list[Tensor], grads: list[Tensor], means: list[Tensor], squares: list[Tensor], *,
                step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """torch's fused kernel of the device."""
    # filled on the device: a copy of a number of the host would wait for all work before it
    count = torch.full((), float(step), device=parameters[0].device)
    torch._fused_adamw_(
        parameters, grads, means, squares, [], [count] * len(parameters), lr=lr, beta1=betas[0], beta2=betas[1],
        weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False, grad_scale=None, found_inf=None)


class FusedAdamW(torch.optim.Optimizer):
    """AdamW with the step count in the parameter group.

    megatron-core's distributed optimizer saves and reshards only optimizers of this form (the one of Apex and
    Transformer Engine): `step` belongs to the group, a parameter's state is `exp_avg` and `exp_avg_sq`.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, **unused: Any):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
                                  "bias_correction": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            # also without parameters: every rank of a group must count the same steps
            group["step"] = group.get("step", 0) + 1
            parameters = [p for p in group["params"] if p.grad is not None and p.numel()]
            if not parameters:
                continue
            states = [self.moments(parameter) for parameter in parameters]
            adamw(parameters, [p.grad for p in parameters], [state["exp_avg"] for state in states],
                  [state["exp_avg_sq"] for state in states], step=group["step"], lr=group["lr"], betas=group["betas"],
                  eps=group["eps"], weight_decay=group["weight_decay"])

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter; both moments are zeros before its first step."""
        state: dict[str, Tensor] = self.state[parameter]
        for name in MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(parameter)
        return state
