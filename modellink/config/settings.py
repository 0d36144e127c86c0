"""Every setting of training, generation and evaluation, one section a purpose; names and defaults are Megatron-LM's.

A default that differs from Megatron-LM says so in its help. The architecture's values default to None here: they
come from the checkpoint's config.json or the `--model` preset (`modellink.models.resolve`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from modellink.config.fields import flag
from modellink.config.parser import parse_known_sections, parse_sections


@dataclass(frozen=True)
class ModelSettings:
    """Model: a preset or config.json, and flags that restate it."""

    model: str | None = flag(None, "preset (qwen15-0.5b ... qwen15-110b), a config.json or its folder")
    num_layers: int | None = flag(None, "number of transformer layers", type=int)
    hidden_size: int | None = flag(None, "hidden size", type=int)
    ffn_hidden_size: int | None = flag(None, "width of the gated MLP", type=int)
    num_attention_heads: int | None = flag(None, "number of query heads", type=int)
    group_query_attention: bool = flag(False, "the model has fewer key/value groups than heads")
    num_query_groups: int | None = flag(None, "number of key/value groups", type=int)
    kv_channels: int | None = flag(None, "size of a head", type=int)
    vocab_size: int | None = flag(None, "rows of the embedding table before padding", type=int)
    padded_vocab_size: int | None = flag(None, "rows of the embedding table after padding; checked", type=int)
    make_vocab_size_divisible_by: int = flag(
        1, "pad the vocabulary to a multiple of this times TP (Megatron-LM's own default is 128)")
    grow_vocab: bool = flag(
        False, "add vocabulary rows (the mean of the others) when the tokenizer has more words than the model")
    max_position_embeddings: int | None = flag(None, "longest position the run may use", type=int)
    position_embedding_type: str = flag("rope", "position embedding; Qwen1.5 has rope", choices=["rope"])
    use_rotary_position_embeddings: bool = flag(True, "rotary positions; Qwen1.5 always has them")
    rotary_base: float | None = flag(None, "base of the rotary embedding", type=float)
    rotary_percent: float = flag(1.0, "share of a head that is rotated; Qwen1.5 rotates all")
    normalization: str = flag("RMSNorm", "normalisation; Qwen1.5 has RMSNorm", choices=["RMSNorm", "LayerNorm"])
    norm_epsilon: float | None = flag(None, "epsilon of the norms", names=["--layernorm-epsilon"], type=float)
    swiglu: bool = flag(True, "gated SiLU MLP; Qwen1.5 always has it")
    untie_embeddings_and_output_weights: bool = flag(False, "the head has weights of its own")
    bias_linear: bool = flag(False, "bias on every linear layer; Qwen1.5 has none", names=["--add-bias-linear"],
                             off_names=["--disable-bias-linear"])
    add_qkv_bias: bool = flag(True, "bias on query, key and value; Qwen1.5 always has it")
    init_method_std: float | None = flag(
        None, "standard deviation of random weights (default: the model's)", type=float)
    attention_dropout: float = flag(0.0, "dropout on attention weights (Megatron-LM's own default is 0.1)")
    hidden_dropout: float = flag(0.0, "dropout on hidden states (Megatron-LM's own default is 0.1)")
    use_mcore_models: bool = flag(True, "the model is always megatron-core's")
    transformer_impl: str = flag("local", "layer specification", choices=["local"])


@dataclass(frozen=True)
class ParallelSettings:
    """Parallel layout."""

    tensor_model_parallel_size: int = flag(1, "tensor parallel ranks (TP)")
    pipeline_model_parallel_size: int = flag(1, "pipeline stages (PP)")
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None, "layers in each model chunk of the interleaved pipeline (VPP)", type=int)
    num_layer_list: str | None = flag(
        None, "layers of every pipeline stage, for example 2,3,3 (default: all the same)", metavar="N,N,...")
    decoder_first_pipeline_num_layers: int | None = flag(
        None, "layers of the first pipeline stage; the others share the rest evenly", type=int)
    decoder_last_pipeline_num_layers: int | None = flag(
        None, "layers of the last pipeline stage; the others share the rest evenly", type=int)
    sequence_parallel: bool = flag(False, "split norms and dropout along the sequence; has no effect with TP 1")
    use_distributed_optimizer: bool = flag(False, "shard optimizer state over data parallel ranks")
    overlap_grad_reduce: bool = flag(False, "reduce gradients while the backward pass still runs")
    overlap_param_gather: bool = flag(
        False, "gather parameters in the forward pass; needs --use-distributed-optimizer and --overlap-grad-reduce")
    distributed_backend: str = flag(
        "auto", "communication backend; every choice means the device's own (gloo, nccl or hccl)",
        choices=["auto", "nccl", "hccl", "gloo"])
    distributed_timeout_minutes: int = flag(10, "a collective that waits longer ends the job")
    hccl_buffer_size: list[str] | None = flag(
        None, "npu: MiB of a buffer of HCCL, for all groups or as GROUP=MiB for one of world, tp, dp, pp, mp, embd, "
        "optimizer; a group holds two of them (default: HCCL_BUFFSIZE or 200)", nargs="+", metavar="MiB")


@dataclass(frozen=True)
class DeviceSettings:
    """Device and wishes for faster kernels (used where the device has them, otherwise one line says what is used; in
    training a precision, size or layout that a kernel of the device cannot compute ends the run)."""

    device: str = flag(
        "auto", "where to run; auto takes the best that is usable", choices=["auto", "npu", "cuda", "cpu"])
    use_flash_attn: bool = flag(False, "wish: fused attention; on cuda flash attention, which takes bf16 and fp16")
    use_fused_rmsnorm: bool = flag(False, "wish: fused RMSNorm")
    use_fused_rotary_pos_emb: bool = flag(False, "wish: fused rotary embedding")
    use_fused_swiglu: bool = flag(False, "wish: fused SwiGLU")
    use_mc2: bool = flag(
        False, "wish: tensor parallel matrix products that overlap their communication, under --sequence-parallel")
    use_symm_mem: bool = flag(
        False, "wish: what --use-mc2 is on npu, for NVIDIA GPUs of one node that reach each other's memory (NVLink), "
        "by torch's products over symmetric memory; never run on a GPU so far")
    use_mindspeed_ops: bool = flag(
        False, "wish: operators of an installed mindspeed (npu_matmul_add for --gradient-accumulation-fusion)")
    compile: str = flag(
        "off", "torch.compile on cpu and cuda: pointwise compiles RMSNorm, rotary and SwiGLU, layer the whole forward "
        "pass of each transformer layer in training (without tensor parallelism); the first steps take longer and "
        "rounding differs", choices=["off", "pointwise", "layer"])
    jit_compile: bool = flag(False, "wish: operator compilation on the NPU")
    masked_softmax_fusion: bool = flag(False, "wish: fused masked softmax; attention here never holds the scores")
    gradient_accumulation_fusion: bool = flag(
        False, "wish: the backward of a layer adds its weight gradient to the main gradient, on npu inside the matrix "
        "product where an operator does so; cpu and cuda always add there, except under --compile layer")
    use_deter_comp: bool = flag(
        False, "training: the same run gives the same bits again; slower, and an operation that cannot do so ends the "
        "run", names=["--deterministic-mode"])
    attention_softmax_in_fp32: bool = flag(True, "softmax of attention in fp32; always so")


@dataclass(frozen=True)
class TrainSettings:
    """Training run."""

    train_iters: int | None = flag(None, "number of steps", type=int)
    micro_batch_size: int = flag(1, "samples in one forward pass of one data parallel rank")
    global_batch_size: int | None = flag(
        None, "samples of one step (default: one micro batch a rank, PP with interleaving)", type=int)
    rampup_batch_size: list[str] | None = flag(
        None, "batch ramp-up: START INCREMENT SAMPLES", nargs=3, metavar="N")
    seq_length: int | None = flag(None, "tokens of one sample", type=int)
    seed: int = flag(1234, "seed of weights, dropout and data order")
    exit_interval: int | None = flag(None, "save and exit after a step that this number divides", type=int)
    exit_duration_in_mins: float | None = flag(None, "save and exit after this many minutes", type=float)
    eval_interval: int = flag(1000, "steps between evaluations")
    eval_iters: int = flag(100, "steps of one evaluation; none when the validation split is empty")
    recompute_granularity: str | None = flag(
        None, "recompute activations in the backward pass", choices=["full", "selective"])
    recompute_method: str | None = flag(None, "which layers full recompute takes", choices=["uniform", "block"])
    recompute_num_layers: int | None = flag(
        None, "layers in one recomputed unit (uniform) or per stage (block)", type=int)
    recompute_activations: bool = flag(False, "the same as --recompute-granularity selective")
    precision: str = flag("fp32", "precision of the training run (bf16 and fp16 keep fp32 master weights)",
                          switches={"--fp32": "fp32", "--bf16": "bf16", "--fp16": "fp16"})
    loss_scale: float | None = flag(None, "constant loss scale for fp16 (default: dynamic)", type=float)
    initial_loss_scale: float = flag(float(2**32), "first value of the dynamic loss scale")
    min_loss_scale: float = flag(1.0, "smallest dynamic loss scale")
    loss_scale_window: int = flag(1000, "steps without overflow before the scale doubles")
    hysteresis: int = flag(2, "overflows before the scale halves")
    accumulate_allreduce_grads_in_fp32: bool = flag(True, "gradients are summed in fp32; always so")
    finetune: bool = flag(False, "load weights only: step 0, no optimizer, no RNG, data from the start")
    is_instruction_dataset: bool = flag(False, "the data has instruction labels")


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer and schedule."""

    optimizer: str = flag("adam", "optimizer", choices=["adam"])
    lr: float | None = flag(None, "peak learning rate", type=float)
    min_lr: float = flag(0.0, "smallest learning rate of the schedule")
    lr_decay_style: str = flag("linear", "shape of the schedule", choices=["constant", "linear", "cosine"])
    lr_decay_iters: int | None = flag(None, "steps until --min-lr (default: --train-iters)", type=int)
    lr_warmup_fraction: float | None = flag(None, "share of the decay steps spent on warm-up", type=float)
    lr_warmup_iters: int = flag(0, "steps of warm-up")
    lr_warmup_init: float = flag(0.0, "learning rate at the start of warm-up")
    override_opt_param_scheduler: bool = flag(
        False, "on resume take the schedule of the flags instead of the checkpoint's")
    weight_decay: float = flag(0.01, "weight decay of matrices (biases and norms have none)")
    adam_beta1: float = flag(0.9, "decay of the first moment")
    adam_beta2: float = flag(0.999, "decay of the second moment")
    adam_eps: float = flag(1e-8, "Adam's epsilon")
    clip_grad: float = flag(1.0, "largest gradient norm; 0 switches clipping off")


@dataclass(frozen=True)
class DataSettings:
    """Data."""

    data_path: list[str] | None = flag(None, "prefix of .bin/.idx files, or a blend: WEIGHT PREFIX WEIGHT PREFIX ...",
                                       nargs="+", metavar="PREFIX")
    split: str | None = flag(None, "shares of train, validation and test (default: 969,30,1)")
    train_data_path: list[str] | None = flag(None, "prefix or blend for training", nargs="+", metavar="PREFIX")
    valid_data_path: list[str] | None = flag(None, "prefix or blend for validation", nargs="+", metavar="PREFIX")
    test_data_path: list[str] | None = flag(None, "prefix or blend for the test", nargs="+", metavar="PREFIX")
    data_cache_path: str | None = flag(None, "folder for index caches (default: beside the data)")
    variable_seq_lengths: bool = flag(
        False, "pad instruction samples to the longest one of the global batch instead of --seq-length")
    pad_to_multiple_of: int = flag(8, "with --variable-seq-lengths: round the padded length up to a multiple of this")
    pack: bool = flag(False, "put several instruction samples into one row of --seq-length; none sees another")
    prompt_type: str | None = flag(
        None, "template that instruction data should have been made with; a warning says when it was another")
    mock_data: bool = flag(False, "train on generated tokens; needs neither data nor tokenizer")
    shared_storage: bool = flag(False, "nodes share a disk; never assumed, so this has no effect")
    num_workers: int = flag(
        0, "reader processes per rank; 0 reads in the training process (Megatron-LM's default is 2)")
    tokenizer_type: str = flag("PretrainedFromHF", "kind of tokenizer", choices=["PretrainedFromHF"])
    tokenizer_name_or_path: str | None = flag(
        None, "folder of the tokenizer (a HF folder)", names=["--tokenizer-model"])
    tokenizer_not_use_fast: bool = flag(False, "use the slow tokenizer class")


@dataclass(frozen=True)
class CheckpointSettings:
    """Checkpoints."""

    load: str | None = flag(None, "checkpoint folder, of any layout, or HF folder to start from")
    save: str | None = flag(None, "checkpoint folder to write")
    save_interval: int | None = flag(None, "steps between checkpoints (the last step is always saved)", type=int)
    ckpt_format: str = flag(
        "torch", "form of what --save writes: a file a rank, or torch_dist, which continues in any layout (what --load "
        "reads is told from the disk)", choices=["torch", "torch_dist"])
    save_hf: str | None = flag(
        None, "folder for HF exports; each is a whole HF model in a folder of its own, iter_ with the step")
    save_hf_interval: int | None = flag(None, "steps between HF exports (the last step is always exported)", type=int)
    load_optim: bool = flag(True, "load optimizer state")
    load_rng: bool = flag(True, "load random states")
    save_optim: bool = flag(True, "save optimizer state")
    save_rng: bool = flag(True, "save random states")
    exit_on_missing_checkpoint: bool = flag(True, "stop when --load holds no checkpoint; always so")


@dataclass(frozen=True)
class LoggingSettings:
    """Logging."""

    log_interval: int = flag(1, "steps between metric lines (Megatron-LM's own default is 100)")
    log_throughput: bool = flag(True, "tokens/s and TFLOP/s in the metric line; always there")
    tensorboard_dir: str | None = flag(None, "TensorBoard folder (default: --save folder/tensorboard)")
    metrics_file: str | None = flag(None, "JSON lines of metrics (default: --save folder/metrics.jsonl)")


@dataclass(frozen=True)
class ProfileSettings:
    """Profiling of training steps."""

    profile: bool = flag(False, "record a trace of some steps with the device's profiler")
    profile_step_start: int = flag(10, "record the steps after this one")
    profile_step_end: int = flag(12, "last step to record")
    profile_ranks: list[int] | None = flag(None, "ranks that record (default: 0)", nargs="+", type=int,
                                           metavar="RANK")
    profile_dir: str = flag("profile", "folder of the traces (one file a rank, for Perfetto or chrome://tracing)")


@dataclass(frozen=True)
class GenerationSettings:
    """Generation."""

    task: list[str] | None = flag(
        None, "what inference.py does, in this order: greedy, do_sample, beam_search, beam_search_with_sampling, "
        "return_output_log_probs, chat (default: greedy on the prompts, then chat when standard input is a terminal); "
        "or evaluation tasks", nargs="+", metavar="TASK")
    prompt: list[str] | None = flag(None, "prompts", nargs="+", metavar="TEXT")
    prompts_file: str | None = flag(
        None, "more prompts: .txt (one a line), .json (a list), .jsonl (texts, or objects with the key prompt), or - "
        "for lines of standard input", metavar="FILE")
    output_file: str | None = flag(None, "write every answer to this file too, as JSON lines", metavar="FILE")
    max_new_tokens: int = flag(128, "most tokens to generate")
    max_length: int | None = flag(None, "most tokens of prompt and answer together", type=int)
    temperature: float = flag(0.7, "sampling temperature")
    top_k: int = flag(50, "sample from this many best tokens; 0 = all")
    top_p: float = flag(0.95, "sample from the smallest set with this probability; 1 = all")
    min_p: float = flag(0.0, "sample from tokens at least this share as likely as the best one; 0 = all")
    min_new_tokens: int = flag(0, "no stop token before this many tokens")
    repetition_penalty: float = flag(
        1.0, "divides the positive logits, and multiplies the negative ones, of tokens in prompt or answer; 1 = none")
    presence_penalty: float = flag(0.0, "taken off the logits of tokens that the answer has; 0 = none")
    num_beams: int = flag(2, "beams of a beam search")
    length_penalty: float = flag(
        1.0, "a beam's log-probability is divided by its length to this power; above 0 favours long answers")
    early_stopping: bool = flag(False, "end a beam search as soon as --num-beams beams are ended")
    num_samples: int = flag(1, "answers to each prompt, with seeds --seed, --seed + 1, ...")
    stop: list[str] | None = flag(None, "texts that end an answer and are not part of it", nargs="+", metavar="TEXT")
    max_batch_size: int = flag(32, "most requests (beams count) that are generated at the same time")
    max_kv_cache_gb: float | None = flag(
        None, "most GiB of KV cache on a rank: fewer requests run at the same time, and one that can never fit is "
        "refused (default: no limit)", type=float)
    kv_cache_dtype: str = flag(
        "auto", "what the KV cache holds: the model's precision, or int8 with a scale for each token and head",
        choices=["auto", "int8"])
    cuda_graphs: bool = flag(
        False, "on cuda, one rank and without adapters: record steps of generation and launch them as a whole")
    prefix_reuse: bool = flag(True, "compute what prompts have in common at their beginning once")
    add_eos_token: list[str] | None = flag(None, "further tokens that end an answer, by name", nargs="+",
                                           metavar="TOKEN")


@dataclass(frozen=True)
class ChatSettings:
    """Chat."""

    inference_prompt_type: str | None = flag(
        None, "prompt template, as --prompt-type (default: the one recorded with the weights or adapters, else qwen); "
        "given, it is laid around the prompts of the other tasks too")
    hf_chat_template: bool = flag(False, "the tokenizer's own chat template, the same as --inference-prompt-type auto")
    system: str | None = flag(None, "system text (default: the template's)", metavar="TEXT")
    history: bool = flag(True, "answer with the earlier turns in view")
    history_turns: int | None = flag(
        None, "most earlier turns in view (the original has 3; default: as many as fit)", type=int)
    history_tokens: int | None = flag(
        None, "most tokens of a whole prompt; the oldest turns are left out (default: what the context leaves beside "
        "the answer, at least half of it unless --max-new-tokens says otherwise)", type=int)
    predict_data: list[str] | None = flag(
        None, "questions to ask one after another instead of reading them, or files of them (.txt, .json, .jsonl)",
        nargs="+", metavar="TEXT|FILE")
    run_demo: bool = flag(False, "begin with three fixed questions")


@dataclass(frozen=True)
class LoraSettings:
    """LoRA; given --lora-target-modules, only adapters are trained and saved, on the frozen weights of --load."""

    lora_target_modules: list[str] | None = flag(
        None, "linear layers that get adapters: query_key_value dense dense_h_to_4h dense_4h_to_h (or linear_qkv "
        "linear_proj linear_fc1 linear_fc2) share one A over each fused layer; q_proj k_proj v_proj o_proj gate_proj "
        "up_proj down_proj, or all-linear for these seven, train one adapter per projection as PEFT does",
        nargs="+", metavar="MODULE")
    lora_load: str | None = flag(
        None, "adapter checkpoint of any layout, or PEFT folder: training starts from its weights at step 0 (an "
        "adapter checkpoint in --save is continued instead), generation uses it over --load")
    lora_r: int = flag(16, "rank of the adapters")
    lora_alpha: float = flag(32.0, "adapters are scaled by this over the rank")
    lora_dropout: float = flag(0.0, "dropout on the input of the adapters")
    use_rslora: bool = flag(False, "scale adapters by alpha over the root of the rank (rsLoRA)")
    use_dora: bool = flag(False, "also train the length of each row of the adapted weights (DoRA)")
    lora_modules_to_save: list[str] | None = flag(
        None, "modules trained whole beside the adapters: word_embeddings, output_layer (with a tied head both are the "
        "embedding)", nargs="+", metavar="MODULE")
    lora_register_forward_hook: list[str] | None = flag(
        None, "accepted without effect: gradients reach the adapters without it", nargs="+", metavar="MODULE")


@dataclass(frozen=True)
class PosttrainSettings:
    """Post-training (posttrain_gpt.py)."""

    stage: str | None = flag(None, "what to train on: instruction samples (sft) or preference pairs (dpo)",
                             choices=["sft", "dpo"])
    dpo_loss_type: str = flag("sigmoid", "preference loss", choices=["sigmoid", "hinge", "ipo"])
    dpo_beta: float = flag(0.1, "how strongly the model is held to its reference")
    dpo_label_smoothing: float = flag(0.0, "share of pairs taken to be labelled the wrong way round (sigmoid only)")
    ref_load: str | None = flag(
        None, "checkpoint of the reference model (default: --load; LoRA runs switch their adapters off instead)")


BACKENDS = ["modellink", "lm-eval"]


@dataclass(frozen=True)
class EvaluationSettings:
    """Evaluation (evaluation.py)."""

    backend: str = flag(
        BACKENDS[0], "whose tasks: modellink's, or lm-eval's; with lm-eval every flag that is not about the model, its "
        "layout, precision or KV cache is lm-eval's own (--tasks, --num_fewshot, --limit, --output_path ...)",
        choices=BACKENDS)
    task_data_path: list[str] | None = flag(
        None, "folder or file of each task of --task, in their order (needle can do without)", nargs="+",
        metavar="PATH")
    fewshot_data_path: list[str] | None = flag(
        None, "folder or file of each task's examples (default: the folder dev beside the questions; gsm8k: "
        "train.jsonl, bbh: cot-prompts, agieval: few_shot_prompts.csv)", nargs="+", metavar="PATH")
    num_fewshot: int | None = flag(
        None, "examples before each question (default: the task's own number; 0 with --chat-template)", type=int)
    protocol: str | None = flag(
        None, "how answers are found: log-likelihoods of the choices (default for mmlu, cmmlu, ceval, boolq and "
        "agieval's sets of one right letter), or a generated text (default for the others, and the way of ModelLink)",
        choices=["loglikelihood", "generation"])
    chat_template: bool = flag(
        False, "ask in one user turn of the model's chat template (ModelLink's own default is on)")
    instruction_template: str | None = flag(
        None, "text around a question: {question} or {prompt}, {few_shot_examples} or {fewshot_template}, {subject}",
        metavar="TEXT")
    evaluation_batch_size: int = flag(
        32, "questions in one step of the engine, on each replica (ModelLink's own default is 1)")
    limit: int | None = flag(
        None, "ask at most this many questions of each subject (needle: of each length and depth)", type=int,
        metavar="N")
    greedy: bool = flag(
        True, "answers are the most likely tokens (ModelLink's own default samples); --no-greedy samples with "
        "--temperature, --top-k, --top-p and --seed")
    eval_lengths: list[int] | None = flag(
        None, "needle, perplexity: tokens of a text (default: --seq-length and up to three halvings of it)", nargs="+",
        type=int, metavar="N")
    needle_depths: list[int] | None = flag(
        None, "needle: where the needle lies, in percent of the text (default: 0 25 50 75 100)", nargs="+", type=int,
        metavar="PERCENT")
    evaluation_output: str = flag(
        "evaluation", "folder of the results (TASK.json, TASK.csv) and of the answers a killed run is resumed from",
        metavar="DIR")
    allow_code_execution: bool = flag(False, "humaneval: run the code that the model wrote, in its sandbox")


@dataclass(frozen=True)
class Settings:
    """All sections, and which fields the command line gave."""

    model: ModelSettings
    parallel: ParallelSettings
    device: DeviceSettings
    train: TrainSettings
    optimizer: OptimizerSettings
    data: DataSettings
    checkpoint: CheckpointSettings
    logging: LoggingSettings
    profiling: ProfileSettings
    generation: GenerationSettings
    chat: ChatSettings
    lora: LoraSettings
    post: PosttrainSettings
    evaluation: EvaluationSettings
    given: frozenset[str] = frozenset()

    @property
    def data_kind(self) -> str:
        """What the data holds: `text`, `instruction` samples or preference `pairs`."""
        if self.post.stage == "dpo":
            return "pairs"
        return "instruction" if self.train.is_instruction_dataset or self.post.stage == "sft" else "text"


SECTIONS: tuple[type, ...] = (ModelSettings, ParallelSettings, DeviceSettings, TrainSettings, OptimizerSettings,
                              DataSettings, CheckpointSettings, LoggingSettings, ProfileSettings, GenerationSettings,
                              ChatSettings, LoraSettings, PosttrainSettings, EvaluationSettings)


def parse_settings(prog: str, description: str, argv: Sequence[str] | None = None) -> Settings:
    """Parse a command line of Megatron/ModelLink flags.

    Raises:
        ConfigError: an unknown flag (with near matches) or a value of the wrong kind.
    """
    sections, given = parse_sections(prog, description, SECTIONS, argv)
    values: dict[str, Any] = {field.name: section for field, section in zip(fields(Settings), sections)}
    return Settings(**values, given=given)


def parse_known_settings(prog: str, description: str, argv: Sequence[str] | None,
                         without: Sequence[type]) -> tuple[Settings, list[str]]:
    """As `parse_settings`, for a command line that also has words of another program.

    Args:
        without: sections whose flags are left to the other program.

    Returns:
        the settings, and the words that are not of its flags.
    """
    known = [section for section in SECTIONS if section not in without]
    sections, given, rest = parse_known_sections(prog, description, known, argv)
    found = {type(section): section for section in sections}
    values: dict[str, Any] = {field.name: found.get(section) or section()
                              for field, section in zip(fields(Settings), SECTIONS)}
    return Settings(**values, given=given), rest


def section_fields() -> list[tuple[type, list]]:
    """Every section with its fields, for the table in docs/flags.md."""
    return [(section, list(fields(section))) for section in SECTIONS]
