"""From a run to the forms of its operations."""

import dataclasses

from modellink.device.base import Device
from modellink.models.run import Run
from modellink.ops.forms import DTYPES, Situation, use_forms
from modellink.ops.table import choose
from modellink.parallel.rank import Rank

WISHES = ("use_mc2", "use_symm_mem", "use_mindspeed_ops", "gradient_accumulation_fusion")


def situation_of(run: Run, device: Device) -> Situation:
    """What the choice of forms needs to know of a run."""
    situation = make_situation(run, device.name, device.product_name())
    return dataclasses.replace(situation, node_ranks=Rank.from_environment().local_world_size)


def make_situation(run: Run, device: str, product: str) -> Situation:
    """As `situation_of`, for a device that need not be here.

    Args:
        run: the resolved run.
        device: `cpu`, `cuda` or `npu`.
        product: the vendor's name of it, empty when unknown.
    """
    settings, model, tensor = run.settings, run.model, run.dims.tensor
    wishes = frozenset(name for name in WISHES if getattr(settings.device, name))
    if settings.device.compile != "off":
        wishes |= {"compile"} if settings.device.compile == "pointwise" else {"compile", "compile_layer"}
    return Situation(
        device, product, DTYPES[settings.train.precision], model.head_dim,
        model.num_attention_heads // tensor, model.num_query_groups // tensor,
        model.hidden_size, model.ffn_hidden_size // tensor,
        # what the products with communication reduce over: column layers forward and row layers backward, then row
        # layers forward
        widths=(model.hidden_size, model.num_attention_heads * model.head_dim // tensor,
                model.ffn_hidden_size // tensor),
        tensor=tensor, is_sequence_parallel=run.dims.sequence_parallel and tensor > 1,
        has_adapters=run.lora is not None,
        wishes=wishes)


def choose_forms(run: Run, device: Device) -> None:
    """Take the forms of this run into use for tensors on the device. Call it before the model is built."""
    use_forms(choose(situation_of(run, device)), device.name)
