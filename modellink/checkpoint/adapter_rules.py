"""The rules of adapters, derived from those of the weights they sit on. HF coordinates are PEFT's names."""

from modellink.checkpoint.layout import Layout
from modellink.checkpoint.qwen15 import embedding_rule, layer_rules, output_rule
from modellink.checkpoint.rules import HFTensor, Rule
from modellink.config.model import ModelConfig
from modellink.lora.peft import peft_name
from modellink.lora.plan import PROJECTIONS, LoraPlan


def adapter_layer_rules(plan: LoraPlan, model: ModelConfig, layer: int) -> list[Rule]:
    """The rules of the adapters of one transformer layer, by its global number.

    An adapter over a whole fused layer has one A; its rule names the first projection's.
    """
    rules = []
    for base in layer_rules(model, layer):
        owner = base.megatron.removesuffix(".weight")
        linear = owner.rpartition(".")[2]
        if base.megatron == owner or linear not in PROJECTIONS:  # a bias or a norm
            continue
        for part in plan.parts(linear):
            packed = [(name, tensor) for name, tensor in zip(PROJECTIONS[linear], base.hf) if part in ("", name)]
            place = f"{owner}.{part}." if part else f"{owner}."
            inputs = base.hf[0].shape[1]
            row = base.dim == 1
            rules.append(Rule(f"{place}lora_A.weight",
                              (HFTensor(peft_name(layer, packed[0][0], "lora_A"), (plan.rank, inputs)),),
                              dim=1 if row else None))
            for tensor, width in [("lora_B", (plan.rank,))] + [("lora_magnitude", ())] * plan.use_dora:
                outputs = tuple(HFTensor(peft_name(layer, name, tensor), (weight.shape[0], *width))
                                for name, weight in packed)
                rules.append(Rule(f"{place}{tensor}.weight", outputs, dim=None if row else 0,
                                  units=None if row else base.units))
    return rules


def adapter_chunk_rules(plan: LoraPlan, model: ModelConfig, layout: Layout, stage: int,
                        chunk: int) -> list[tuple[str, Rule]]:
    """Every tensor that an adapter checkpoint holds of one model chunk: its full Megatron name and its rule."""
    named = []
    first, last = layout.is_first(stage, chunk), layout.is_last(stage, chunk)
    if first and "word_embeddings" in plan.modules_to_save:
        rule = embedding_rule(model)
        named.append((rule.megatron, rule))
    for local, layer in enumerate(layout.layer_indices(model.num_layers, stage, chunk)):
        named += [(rule.megatron.format(layer=local), rule) for rule in adapter_layer_rules(plan, model, layer)]
    head = "word_embeddings" if model.tie_word_embeddings else "output_layer"
    if last and head in plan.modules_to_save and not (model.tie_word_embeddings and layout.pipeline == 1):
        rule = output_rule(model)
        named.append((rule.megatron, rule))
    return named


def shared_inputs(plan: LoraPlan, model: ModelConfig) -> dict[str, str]:
    """For PEFT names of A that a fused adapter shares: the name it is stored under."""
    if plan.kind == "hf":
        return {}
    return {peft_name(layer, name, "lora_A"): peft_name(layer, PROJECTIONS[linear][0], "lora_A")
            for layer in range(model.num_layers) for linear in plan.targets for name in PROJECTIONS[linear]}
