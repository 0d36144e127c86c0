"""Merges settings, `--model` and loaded weights into one checked run, before any device or process group starts."""

from modellink.checkpoint.layout import stage_layers
from modellink.checks.adapters import check_lora, find_lora, refuse_adapters_as_base
from modellink.checks.compiling import check_compile, compile_notices
from modellink.checks.inputs import check_data, check_tokenizer, data_notices, grown_rows_notice
from modellink.checks.kernels import check_kernels, check_precision, product_of
from modellink.checks.layout import (
    check_batches,
    check_recompute_layers,
    check_sequence,
    check_tensor_parallel,
    padded_rows,
)
from modellink.checks.profile import check_profile
from modellink.checks.values import Program, check_values
from modellink.checks.weights import Weights, check_resume, check_save_form, find_weights
from modellink.checks.wishes import wish_notices
from modellink.config.errors import ConfigError, ProblemList
from modellink.config.model import ModelConfig
from modellink.config.settings import Settings
from modellink.device.buffers import buffer_notice
from modellink.models.resolve import resolve_model
from modellink.models.run import Run
from modellink.parallel.dims import ParallelDims

TITLES: dict[Program, str] = {"train": "Pretrain a Qwen1.5 model.", "generate": "Generate text with a Qwen1.5 model.",
                              "evaluate": "Ask a Qwen1.5 model the questions of benchmarks and score its answers."}


def prepare_run(settings: Settings, world_size: int, program: Program, *, elsewhere: bool = False) -> Run:
    """Check everything that can be checked without starting anything.

    Args:
        settings: the parsed command line.
        world_size: ranks of the job.
        program: what will run.
        elsewhere: the job will run on another machine, so its device need not be usable here (`--check`).

    Returns:
        The resolved run.

    Raises:
        ConfigError: every problem found, one sentence each.
    """
    problems = ProblemList()
    check_values(settings, program, problems)
    weights, model, origins = _find_model(settings, program, problems)
    if program == "train":
        check_data(settings, problems)
        check_profile(settings, world_size, problems)
    stored = model
    model = check_tokenizer(settings, model, program, problems)
    if model is None or stored is None:
        problems.raise_if_any()
        raise AssertionError("a run without an architecture always has a problem")
    dims = _layout(settings, model, world_size, program, problems)
    if program == "train":
        plan = check_lora(settings, weights, stored, dims, problems)
    else:
        plan = find_lora(settings, weights, stored, problems)
    rows = 0
    if settings.parallel.tensor_model_parallel_size >= 1:
        check_tensor_parallel(model, settings.parallel.tensor_model_parallel_size, problems)
        rows = padded_rows(model, settings, problems)
    batch = 1
    if dims is not None:
        check_sequence(model, settings, dims, problems)
        if program == "train":
            check_recompute_layers(model, settings, dims, problems)
            batch = check_batches(settings, dims, problems)
            check_save_form(settings, problems)
            if weights is not None and plan is None:  # optimizer state of a base has no meaning for adapters
                check_resume(settings, weights, model, dims, problems)
    device = problems.catch(lambda: _device(settings, program, elsewhere))
    product = ""
    if isinstance(device, tuple):
        product = "" if elsewhere else product_of(device[0])
        check_precision(settings, product, problems)
        check_compile(settings, device[0], not elsewhere, problems)
    problems.raise_if_any()
    assert dims is not None and isinstance(device, tuple)
    run = Run(settings=settings, model=model, origins=origins, dims=dims, padded_vocab_size=rows,
              seq_length=settings.train.seq_length or model.max_position_embeddings, global_batch_size=batch,
              notices=(*_notices(settings, dims, program, *device), *grown_rows_notice(stored, model, settings),
                       *data_notices(settings)), lora=plan, device=device[0],
              trains=program == "train")
    if program == "train":
        check_kernels(run, product, problems)
        problems.raise_if_any()
    return run


def _find_model(settings: Settings, program: Program,
                problems: ProblemList) -> tuple[Weights | None, ModelConfig | None, dict[str, str]]:
    weights = None
    try:
        if settings.checkpoint.load is not None:
            refuse_adapters_as_base(settings.checkpoint.load)
        weights = find_weights(settings, program)
    except ConfigError as error:
        for problem in error.problems:
            problems.add(problem)
        if settings.model.model is None:  # without the weights nothing is known of the architecture
            return None, None, {}
    try:
        model, origins = resolve_model(settings, (weights.folder, weights.model) if weights else None)
    except ConfigError as error:
        for problem in error.problems:
            problems.add(problem)
        return weights, None, {}
    return weights, model, origins


def _layout(settings: Settings, model: ModelConfig, world_size: int, program: Program,
            problems: ProblemList) -> ParallelDims | None:
    parallel = settings.parallel
    chunk = parallel.num_layers_per_virtual_pipeline_stage if program == "train" else None
    try:
        layers = stage_layers(model.num_layers, parallel.pipeline_model_parallel_size,
                              layer_list=parallel.num_layer_list, first=parallel.decoder_first_pipeline_num_layers,
                              last=parallel.decoder_last_pipeline_num_layers)
        dims = ParallelDims.from_world_size(
            world_size, tensor=parallel.tensor_model_parallel_size, pipeline=parallel.pipeline_model_parallel_size,
            num_layers=model.num_layers, layers_per_chunk=chunk, sequence_parallel=parallel.sequence_parallel,
            stage_layers=layers)
    except ConfigError as error:
        for problem in error.problems:
            problems.add(problem)
        return None
    return dims


def _device(settings: Settings, program: Program, elsewhere: bool) -> tuple[str, str]:
    """(name, communication backend) of the device the run uses; empty where another machine will choose."""
    asked = settings.device.device
    if elsewhere:
        return ("" if asked == "auto" else asked), ""
    from modellink.device.cuda import order_kernels  # imports torch
    from modellink.device.select import select_device

    # products over symmetric memory go through two streams, which one queue would make wait for each other
    if program == "train" and asked in ("auto", "cuda") and not settings.device.use_symm_mem:
        order_kernels(settings.parallel.tensor_model_parallel_size)
    device = select_device(asked)
    return device.name, device.backend


def _notices(settings: Settings, dims: ParallelDims, program: Program, device: str, backend: str) -> list[str]:
    notices = [*wish_notices(settings, dims, device, backend), *compile_notices(settings, program),
               *buffer_notice(settings.parallel.hccl_buffer_size, device)]
    if "lora_register_forward_hook" in settings.given:
        notices.append("--lora-register-forward-hook has no effect: gradients reach the adapters without it.")
    if program == "train" and "tokenizer_not_use_fast" in settings.given:
        notices.append("--tokenizer-not-use-fast has no effect: training reads token ids.")
    if program != "train" and settings.parallel.num_layers_per_virtual_pipeline_stage is not None:
        notices.append("--num-layers-per-virtual-pipeline-stage has no effect on generation.")
    return notices
