"""Builds the model chunks of this rank from a run."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from modellink.lora.inject import inject
from modellink.models.gpt import QwenModel
from modellink.models.run import Run
from modellink.models.spec import block_spec
from modellink.ops.forms import DTYPES
from modellink.ops.parallel_linear import has_own_linear


def transformer_config(run: Run, device_name: str, **changes: Any) -> TransformerConfig:
    """megatron-core's configuration of a run.

    Args:
        run: the resolved run.
        device_name: weights are initialised on the CPU when this is `cpu`.
        changes: fields to set otherwise (the training loop adds its hooks).
    """
    settings, model, dims = run.settings, run.model, run.dims
    train = settings.train
    dtype = DTYPES[train.precision]
    granularity = "selective" if train.recompute_activations else train.recompute_granularity
    interleaved = dims.chunks > 1
    values: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.head_dim,
        "layernorm_epsilon": model.rms_norm_eps,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "add_qkv_bias": model.add_qkv_bias,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "init_method_std": settings.model.init_method_std or model.initializer_range,
        "attention_dropout": settings.model.attention_dropout,
        "hidden_dropout": settings.model.hidden_dropout,
        "tensor_model_parallel_size": dims.tensor,
        "pipeline_model_parallel_size": dims.pipeline,
        "virtual_pipeline_model_parallel_size": dims.chunks if interleaved else None,
        "pipeline_model_parallel_layout": stage_lists(dims.stage_layers) if dims.stage_layers else None,
        "sequence_parallel": dims.sequence_parallel,
        # With two stages both pipeline neighbours are the same rank; unless each message is sent on its own, batched
        # messages of an interleaved schedule cross silently. No flag selects another pair.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "pipeline_dtype": dtype,
        "params_dtype": dtype,
        "bf16": train.precision == "bf16",
        "fp16": train.precision == "fp16",
        "recompute_granularity": granularity,
        "recompute_method": train.recompute_method,
        "recompute_num_layers": train.recompute_num_layers,
        "calculate_per_token_loss": True,
        "deterministic_mode": settings.device.use_deter_comp,
        "use_cpu_initialization": device_name == "cpu",
        # Sends of the interleaved schedule are still under way when it would free their storage: the neighbour then
        # receives whatever lies there (seen on gloo: loss off by 0.1, gradient norm 31 instead of 1.4, NaN with TP).
        "deallocate_pipeline_outputs": not interleaved,
        # kernels that are not in the wheel, or that our layers replace
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
    }
    values.update(changes)
    return TransformerConfig(**values)


def stage_lists(stage_layers: tuple[int, ...]) -> list[list[str]]:
    """Uneven stages in megatron-core's words: what each stage holds, in order."""
    stages = [["decoder"] * size for size in stage_layers]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def build_chunks(run: Run, config: TransformerConfig, device_name: str) -> list[QwenModel]:
    """The model chunks of this rank (one, or one for each virtual stage), on the CPU or the current device.

    A run with a LoRA plan gets its adapters here, and everything else frozen.
    """
    model, dims = run.model, run.dims
    own_linear = has_own_linear(device_name)
    layers = dims.chunk_layers(model.num_layers, parallel_state.get_pipeline_model_parallel_rank())
    chunks = []
    for chunk in range(dims.chunks):
        stage = {"ignore_virtual": False, "vp_stage": chunk} if dims.chunks > 1 else {}
        chunks.append(QwenModel(
            config,
            block_spec(layers, adapted=run.lora is not None, own_linear=own_linear),
            vocab_size=run.padded_vocab_size,
            real_vocab_size=model.vocab_size,
            max_sequence_length=model.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(**stage),
            post_process=parallel_state.is_pipeline_last_stage(**stage),
            share_embeddings_and_output_weights=model.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=model.rope_theta,
            vp_stage=chunk if dims.chunks > 1 else None,
        ))
        if run.lora is not None:
            inject(chunks[-1], run.lora, run.settings.train.seed)
    return chunks
