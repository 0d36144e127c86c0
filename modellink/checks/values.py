"""Flags that are wrong by themselves: out of range, missing, contradicting each other, or of a later version."""

from collections.abc import Callable
from dataclasses import fields
from typing import Literal

from modellink.config.errors import ProblemList
from modellink.config.settings import ChatSettings, EvaluationSettings, ProfileSettings, Settings
from modellink.device.buffers import parse_buffer_sizes

Program = Literal["train", "generate", "evaluate"]

_CHAT = tuple(field.name for field in fields(ChatSettings))
_EVALUATION = tuple(field.name for field in fields(EvaluationSettings))
_TRAINING = (*(field.name for field in fields(ProfileSettings)), "use_deter_comp")
# program -> whose flags it does not take
OF_OTHERS: dict[Program, dict[str, tuple[str, ...]]] = {
    "train": {"inference.py": _CHAT, "evaluation.py": _EVALUATION},
    "generate": {"evaluation.py": _EVALUATION, "pretrain_gpt.py": _TRAINING},
    "evaluate": {"inference.py": _CHAT, "pretrain_gpt.py": _TRAINING},
}

Rule = tuple[Callable[[float], bool], str]
_AT_LEAST_1: Rule = (lambda value: value >= 1, "at least 1")
_AT_LEAST_0: Rule = (lambda value: value >= 0, "at least 0")
_ABOVE_0: Rule = (lambda value: value > 0, "above 0")
_SHARE: Rule = (lambda value: 0 <= value < 1, "at least 0 and below 1")
_UP_TO_1: Rule = (lambda value: 0 <= value <= 1, "between 0 and 1")

# section -> field -> rule; a value of None was not given
RULES: dict[str, dict[str, Rule]] = {
    "model": {"make_vocab_size_divisible_by": _AT_LEAST_1, "max_position_embeddings": _AT_LEAST_1,
              "init_method_std": _ABOVE_0, "attention_dropout": _SHARE, "hidden_dropout": _SHARE,
              "num_layers": _AT_LEAST_1, "hidden_size": _AT_LEAST_1, "ffn_hidden_size": _AT_LEAST_1,
              "num_attention_heads": _AT_LEAST_1, "num_query_groups": _AT_LEAST_1, "vocab_size": _AT_LEAST_1,
              "rotary_base": _ABOVE_0, "norm_epsilon": _ABOVE_0},
    "parallel": {"distributed_timeout_minutes": _AT_LEAST_1},
    "train": {"train_iters": _AT_LEAST_1, "micro_batch_size": _AT_LEAST_1, "global_batch_size": _AT_LEAST_1,
              "seq_length": _AT_LEAST_1, "exit_interval": _AT_LEAST_1, "exit_duration_in_mins": _ABOVE_0,
              "eval_interval": _AT_LEAST_1, "eval_iters": _AT_LEAST_0, "recompute_num_layers": _AT_LEAST_1,
              "loss_scale": _ABOVE_0, "initial_loss_scale": _ABOVE_0, "min_loss_scale": _ABOVE_0,
              "loss_scale_window": _AT_LEAST_1, "hysteresis": _AT_LEAST_1, "seed": _AT_LEAST_0},
    "optimizer": {"lr": _ABOVE_0, "min_lr": _AT_LEAST_0, "lr_decay_iters": _AT_LEAST_1,
                  "lr_warmup_fraction": _UP_TO_1, "lr_warmup_iters": _AT_LEAST_0, "lr_warmup_init": _AT_LEAST_0,
                  "weight_decay": _AT_LEAST_0, "adam_beta1": _SHARE, "adam_beta2": _SHARE, "adam_eps": _ABOVE_0,
                  "clip_grad": _AT_LEAST_0},
    "data": {"num_workers": _AT_LEAST_0, "pad_to_multiple_of": _AT_LEAST_1},
    "checkpoint": {"save_interval": _AT_LEAST_1, "save_hf_interval": _AT_LEAST_1},
    "logging": {"log_interval": _AT_LEAST_1},
    "post": {"dpo_beta": _ABOVE_0, "dpo_label_smoothing": (lambda value: 0 <= value < 0.5, "at least 0 and below 0.5")},
    "lora": {"lora_r": _AT_LEAST_1, "lora_alpha": _ABOVE_0, "lora_dropout": _SHARE},
    "generation": {"max_new_tokens": _AT_LEAST_1, "max_length": _AT_LEAST_1, "temperature": _ABOVE_0,
                   "top_k": _AT_LEAST_0, "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
                   "min_p": _UP_TO_1, "min_new_tokens": _AT_LEAST_0, "repetition_penalty": _ABOVE_0,
                   "num_beams": _AT_LEAST_1, "num_samples": _AT_LEAST_1, "max_batch_size": _AT_LEAST_1,
                   "max_kv_cache_gb": _ABOVE_0},
    "evaluation": {"num_fewshot": _AT_LEAST_0, "evaluation_batch_size": _AT_LEAST_1, "limit": _AT_LEAST_1},
    "chat": {"history_turns": _AT_LEAST_0, "history_tokens": _AT_LEAST_1},
}


def flag_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def check_values(settings: Settings, program: Program, problems: ProblemList) -> None:
    """Add every problem that the command line has by itself."""
    for section, rules in RULES.items():
        for field, (holds, rule) in rules.items():
            value = getattr(getattr(settings, section), field)
            if value is not None and not holds(value):
                problems.add(f"{flag_name(field)} {value}: must be {rule}; correct it.")
    _check_later(settings, program, problems)
    problems.catch(lambda: parse_buffer_sizes(settings.parallel.hccl_buffer_size))
    if program == "train":
        _check_needed(settings, problems)
        _check_data_kind(settings, problems)
        _check_recompute(settings, problems)
        _check_schedule(settings, problems)
        _check_overlap(settings, problems)


def _check_data_kind(settings: Settings, problems: ProblemList) -> None:
    data, kind = settings.data, settings.data_kind
    asked = f"--stage {settings.post.stage}" if settings.post.stage else "--is-instruction-dataset"
    if kind != "instruction":
        for flag, given in (("--pack", data.pack), ("--variable-seq-lengths", data.variable_seq_lengths)):
            if given:
                problems.add(f"{flag}: is for instruction samples only; add --is-instruction-dataset or leave {flag} "
                             "out.")
    elif data.pack and data.variable_seq_lengths:
        problems.add("--pack with --variable-seq-lengths: packed rows all have --seq-length tokens; leave one of them "
                     "out.")
    if kind != "text" and data.mock_data:
        problems.add(f"--mock-data with {asked}: generated tokens have no labels to learn; leave one of them out.")
    if kind == "pairs":
        _check_preference(settings, problems)


def _check_preference(settings: Settings, problems: ProblemList) -> None:
    checkpoint, post = settings.checkpoint, settings.post
    if settings.train.is_instruction_dataset:
        problems.add("--stage dpo with --is-instruction-dataset: preference pairs are not instruction samples; leave "
                     "one of them out.")
    if post.dpo_label_smoothing and post.dpo_loss_type != "sigmoid":
        problems.add(f"--dpo-label-smoothing {post.dpo_label_smoothing} with --dpo-loss-type {post.dpo_loss_type}: "
                     "only the sigmoid loss has it; leave it out.")
    if settings.lora.lora_target_modules is None and post.ref_load is None and (
            checkpoint.load is None or (checkpoint.load == checkpoint.save)):
        problems.add("--ref-load is missing: --stage dpo compares with a reference model, and --load names no "
                     "checkpoint but this run's own; give the weights that tuning started from.")


def _check_later(settings: Settings, program: Program, problems: ProblemList) -> None:
    for others, names in OF_OTHERS[program].items():
        for field in names:
            if field in settings.given:
                problems.add(f"{_as_typed(settings, field)}: is for {others}; leave it out.")


def _as_typed(settings: Settings, field: str) -> str:
    parts = (settings.chat, settings.evaluation, settings.profiling, settings.device)
    section = next(part for part in parts if hasattr(part, field))
    return flag_name(field) if getattr(section, field) is not False else f"--no-{flag_name(field)[2:]}"


def _check_needed(settings: Settings, problems: ProblemList) -> None:
    for value, flag, example in ((settings.train.train_iters, "--train-iters", "--train-iters 5000"),
                                 (settings.train.seq_length, "--seq-length", "--seq-length 8192"),
                                 (settings.optimizer.lr, "--lr", "--lr 1.25e-6")):
        if value is None:
            problems.add(f"{flag} is missing: give it, for example {example}.")
    checkpoint = settings.checkpoint
    if checkpoint.save_interval is not None and checkpoint.save is None:
        problems.add(f"--save-interval {checkpoint.save_interval} without --save: name the folder to save to.")
    if checkpoint.save_hf_interval is not None and checkpoint.save_hf is None:
        problems.add(f"--save-hf-interval {checkpoint.save_hf_interval} without --save-hf: name the folder to "
                     "export to.")
    adapters = [name for name in ("lora_target_modules", "lora_load") if name in settings.given]
    if checkpoint.save_hf is not None and adapters:
        problems.add(f"--save-hf {checkpoint.save_hf} with {flag_name(adapters[0])}: an export holds whole weights, "
                     "but this run trains adapters; leave it out and merge them at conversion.")


def _check_recompute(settings: Settings, problems: ProblemList) -> None:
    train = settings.train
    if train.recompute_activations and train.recompute_granularity == "full":
        problems.add("--recompute-activations means --recompute-granularity selective, but --recompute-granularity "
                     "full is given too: leave one of them out.")
    if train.recompute_granularity == "full":
        if train.recompute_method is None:
            problems.add("--recompute-granularity full needs --recompute-method uniform or block.")
        if train.recompute_num_layers is None:
            problems.add("--recompute-granularity full needs --recompute-num-layers, for example 1.")
    elif train.recompute_method is not None:
        problems.add(f"--recompute-method {train.recompute_method} has a meaning only with --recompute-granularity "
                     "full: add that or leave the method out.")


def _check_schedule(settings: Settings, problems: ProblemList) -> None:
    optimizer, iters = settings.optimizer, settings.train.train_iters
    if optimizer.lr is not None and 0 < optimizer.lr < optimizer.min_lr:
        problems.add(f"--min-lr {optimizer.min_lr:g} is above --lr {optimizer.lr:g}: the schedule can only fall; "
                     "lower --min-lr.")
    if optimizer.lr_warmup_fraction is not None and optimizer.lr_warmup_iters:
        problems.add("--lr-warmup-fraction and --lr-warmup-iters say the same thing twice: leave one of them out.")
    decay = optimizer.lr_decay_iters or iters
    if decay is not None and optimizer.lr_warmup_fraction is None and 0 < decay < optimizer.lr_warmup_iters:
        problems.add(f"--lr-warmup-iters {optimizer.lr_warmup_iters} is more than the {decay} steps of the schedule: "
                     "lower it.")


def _check_overlap(settings: Settings, problems: ProblemList) -> None:
    parallel = settings.parallel
    if not parallel.overlap_param_gather:
        return
    missing = [flag for on, flag in ((parallel.use_distributed_optimizer, "--use-distributed-optimizer"),
                                     (parallel.overlap_grad_reduce, "--overlap-grad-reduce")) if not on]
    if missing:
        problems.add(f"--overlap-param-gather needs {' and '.join(missing)}: add "
                     f"{'it' if len(missing) == 1 else 'them'} or leave --overlap-param-gather out.")
