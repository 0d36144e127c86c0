"""The rule table of Qwen1.5: the only place that knows how HF and Megatron names and packings correspond.

Megatron names are those of megatron-core's local layer spec.
"""

from modellink.checkpoint.layout import Layout
from modellink.checkpoint.rules import HFTensor, Rule
from modellink.config.model import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def embedding_rule(model: ModelConfig) -> Rule:
    table = HFTensor(EMBEDDING, (model.vocab_size, model.hidden_size))
    return Rule("embedding.word_embeddings.weight", (table,), dim=0, padded=True)


def layer_rules(model: ModelConfig, layer: int) -> list[Rule]:
    """The rules of one transformer layer, by its global number; Megatron names keep `{layer}` for the local one."""
    hidden, ffn, groups = model.hidden_size, model.ffn_hidden_size, model.num_query_groups
    kv = groups * model.head_dim
    hf = f"model.layers.{layer}."
    mg = "decoder.layers.{layer}."
    query, key, value = (f"{hf}self_attn.{name}_proj" for name in "qkv")
    rules = [
        Rule(f"{mg}input_layernorm.weight", (HFTensor(f"{hf}input_layernorm.weight", (hidden,)),), dim=None),
        Rule(f"{mg}self_attention.linear_proj.weight",
             (HFTensor(f"{hf}self_attn.o_proj.weight", (hidden, hidden)),), dim=1),
        # one unit is a key-value group: its query heads, its key head, its value head
        Rule(f"{mg}self_attention.linear_qkv.weight",
             (HFTensor(f"{query}.weight", (hidden, hidden)), HFTensor(f"{key}.weight", (kv, hidden)),
              HFTensor(f"{value}.weight", (kv, hidden))), dim=0, units=groups),
    ]
    if model.add_qkv_bias:
        rules.append(Rule(f"{mg}self_attention.linear_qkv.bias",
                          (HFTensor(f"{query}.bias", (hidden,)), HFTensor(f"{key}.bias", (kv,)),
                           HFTensor(f"{value}.bias", (kv,))), dim=0, units=groups))
    return [
        *rules,
        Rule(f"{mg}pre_mlp_layernorm.weight", (HFTensor(f"{hf}post_attention_layernorm.weight", (hidden,)),), dim=None),
        # one unit per rank: the rank's gate rows, then the rank's up rows
        Rule(f"{mg}mlp.linear_fc1.weight",
             (HFTensor(f"{hf}mlp.gate_proj.weight", (ffn, hidden)), HFTensor(f"{hf}mlp.up_proj.weight", (ffn, hidden))),
             dim=0),
        Rule(f"{mg}mlp.linear_fc2.weight", (HFTensor(f"{hf}mlp.down_proj.weight", (hidden, ffn)),), dim=1),
    ]


def final_norm_rule(model: ModelConfig) -> Rule:
    return Rule("decoder.final_layernorm.weight", (HFTensor("model.norm.weight", (model.hidden_size,)),), dim=None)


def output_rule(model: ModelConfig) -> Rule:
    """The output layer; a tied model has one only where the embedding lives in another pipeline stage, as its copy."""
    name = EMBEDDING if model.tie_word_embeddings else HEAD
    table = HFTensor(name, (model.vocab_size, model.hidden_size))
    return Rule("output_layer.weight", (table,), dim=0, padded=True)


def chunk_rules(model: ModelConfig, layout: Layout, stage: int, chunk: int) -> list[tuple[str, Rule]]:
    """Every tensor of one model chunk in order: its full Megatron name (local layer number) and its rule."""
    rules = [embedding_rule(model)] if layout.is_first(stage, chunk) else []
    named = [(rule.megatron, rule) for rule in rules]
    for local, layer in enumerate(layout.layer_indices(model.num_layers, stage, chunk)):
        named += [(rule.megatron.format(layer=local), rule) for rule in layer_rules(model, layer)]
    if layout.is_last(stage, chunk):
        last = [final_norm_rule(model)]
        if not model.tie_word_embeddings or layout.pipeline > 1:
            last.append(output_rule(model))
        named += [(rule.megatron, rule) for rule in last]
    return named


def hf_rules(model: ModelConfig) -> dict[str, tuple[HFTensor, Rule]]:
    """Every HF tensor of the model in order, with the rule that packs it."""
    table: dict[str, tuple[HFTensor, Rule]] = {}
    for _, rule in chunk_rules(model, Layout(), 0, 0):
        for tensor in rule.hf:
            table[tensor.name] = (tensor, rule)
    return table
