"""Names and configuration of PEFT for an adapter."""

from typing import Any

from modellink.lora.plan import PROJECTIONS, LoraPlan

PEFT_PREFIX = "base_model.model."  # before every name of the HF model
_OWNERS = {"linear_qkv": "self_attn", "linear_proj": "self_attn", "linear_fc1": "mlp", "linear_fc2": "mlp"}
_TENSORS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}
_TABLES = {"word_embeddings": "embed_tokens", "output_layer": "lm_head"}


def peft_name(layer: int, projection: str, tensor: str) -> str:
    """The name in adapter_model.safetensors of an adapter's tensor.

    Args:
        layer: number of the layer from 0.
        projection: a HF projection, for example q_proj.
        tensor: lora_A, lora_B or lora_magnitude.
    """
    linear = next(linear for linear, names in PROJECTIONS.items() if projection in names)
    return f"{PEFT_PREFIX}model.layers.{layer}.{_OWNERS[linear]}.{projection}.{_TENSORS[tensor]}"


def peft_config(plan: LoraPlan, base: str | None) -> dict[str, Any]:
    """PEFT's adapter_config.json.

    An adapter over a whole fused layer becomes one adapter for each of its projections, which share the values of A:
    they compute the same.

    Args:
        plan: what was trained.
        base: name or folder of the base model in HF form.
    """
    projections = [name for linear, names in PROJECTIONS.items() for name in names
                   if name in plan.targets or linear in plan.targets]
    alpha = int(plan.alpha) if float(plan.alpha).is_integer() else plan.alpha
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": plan.rank, "lora_alpha": alpha, "lora_dropout": plan.dropout, "bias": "none", "fan_in_fan_out": False,
        "target_modules": projections, "use_rslora": plan.use_rslora, "use_dora": plan.use_dora,
        "modules_to_save": [_TABLES[name] for name in plan.modules_to_save] or None,
    }
