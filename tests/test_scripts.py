"""The example scripts: what they start, what they ask for, and their --check on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import original_flags as original
import pytest

from modellink.config.settings import Settings, parse_settings
from modellink.launch.options import Job, parse_job
from modellink.models.presets.qwen15 import PRESETS

REPO = Path(__file__).parent.parent
FOLDER = REPO / "examples" / "qwen15"
FILES = {"0.5b": "0point5b", "1.8b": "1point8b", **{size: size for size in ("4b", "7b", "14b", "32b", "72b", "110b")}}
PATHS = {"TOKENIZER_PATH": "/t", "DATA_PATH": "/d/x_text_document", "CKPT_LOAD_DIR": "/l", "CKPT_SAVE_DIR": "/s"}
NODE = {"NODE_RANK": "0", "MASTER_ADDR": "10.1.2.3"}


def run(script: str, folder: Path, variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in `folder` with only these variables set."""
    base = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return subprocess.run(["bash", str(FOLDER / script), *arguments], cwd=folder, capture_output=True, text=True,
                          env={**base, "PYTHON": sys.executable, **variables})


def started(script: str, folder: Path, variables: dict[str, str], *arguments: str) -> tuple[Job, Settings]:
    """The job a script starts: the interpreter is replaced by a program that writes its arguments down."""
    recorder = folder / "recorder"
    recorder.write_text('#!/bin/bash\nprintf "%s\\0" "$@" > recorded\nenv -0 > environment\n')
    recorder.chmod(0o755)
    result = run(script, folder, {**variables, "PYTHON": str(recorder)}, *arguments)
    assert result.returncode == 0, result.stderr
    words = (folder / "recorded").read_text().split("\0")[:-1]
    assert words[:3] == ["-m", "modellink.cli", "launch"]
    job = parse_job(words[3:])
    return job, parse_settings("t", "t", job.arguments)


def recorded_environment(folder: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in (folder / "environment").read_text().split("\0") if "=" in line)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.sh")), ids=lambda path: path.name)
def test_every_script_is_valid_bash(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert path.name == "common.sh" or os.access(path, os.X_OK)


def test_there_is_a_script_of_each_kind_for_each_size() -> None:
    names = {f"{kind}_qwen15_{name}_ptd.sh" for kind in ("pretrain", "generate", "evaluate") for name in FILES.values()}
    names |= {f"tune_qwen15_{name}_{kind}_ptd.sh" for kind in ("full", "lora") for name in FILES.values()}
    names |= {"tune_qwen15_32b_ptd.sh", "tune_qwen15_72b_ptd.sh",  # the original's names
              "generate_qwen15_32b_lora_chat_ptd.sh", "generate_qwen15_72b_lora_chat_ptd.sh"}
    assert {path.name for path in FOLDER.glob("*.sh")} == names | {"common.sh"}
    assert {f"qwen15-{size}" for size in FILES} == set(PRESETS)


@pytest.mark.parametrize("size", FILES)
def test_pretrain_scripts_start_what_the_originals_started(size: str, tmp_path: Path) -> None:
    job, ours = started(f"pretrain_qwen15_{FILES[size]}_ptd.sh", tmp_path, {**PATHS, **NODE})
    like = "72b" if size == "110b" else size  # the 110B script came later, with the layout of the 72B
    world, _, _, _, _, _, _, interval, _, _, _ = original.PRETRAIN[like]
    theirs = parse_settings("t", "t", original.pretrain_flags(like))
    assert job.options.nproc_per_node == 8 and job.options.nnodes == world // 8
    assert job.script == str(REPO / "pretrain_gpt.py")
    assert ours.model.model == f"qwen15-{size}" and ours.checkpoint.save_interval == interval
    for section in ("parallel", "train", "optimizer"):
        for field, value in vars(getattr(theirs, section)).items():
            if field not in ("distributed_backend", "finetune"):
                assert getattr(getattr(ours, section), field) == value, field
    # no flag of the architecture: --model can be replaced whole
    assert ours.given & set(vars(ours.model)) == {"model", "init_method_std"}
    assert ours.data.data_path == ["/d/x_text_document"] and ours.data.split == "100,0,0"
    assert ours.checkpoint.load == "/l" and ours.checkpoint.save == "/s" and ours.train.finetune
    assert not ours.checkpoint.load_optim and not ours.checkpoint.load_rng
    environment = recorded_environment(tmp_path)
    assert environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "1" and environment["HCCL_CONNECT_TIMEOUT"] == "1800"


@pytest.mark.parametrize("size", FILES)
def test_generate_scripts_start_what_the_originals_started(size: str, tmp_path: Path) -> None:
    job, ours = started(f"generate_qwen15_{FILES[size]}_ptd.sh", tmp_path, {"CHECKPOINT": "/c", "TOKENIZER_PATH": "/t"})
    tensor, pipeline = original.GENERATE[size][:2] if size in original.GENERATE else (8, 1)
    assert (ours.parallel.tensor_model_parallel_size, ours.parallel.pipeline_model_parallel_size) == (tensor, pipeline)
    assert job.options.nproc_per_node == tensor * pipeline and job.script == str(REPO / "inference.py")
    assert ours.checkpoint.load == "/c" and ours.data.tokenizer_name_or_path == "/t"
    assert ours.generation.max_new_tokens == 256 and ours.train.seed == 42 and ours.train.precision == "bf16"
    assert ours.train.seq_length == ours.model.max_position_embeddings == 8192
    # the original did all its tasks on a prompt of its own and ended in a chat
    assert ours.generation.task is None and ours.generation.prompt == ["How are you?"]


def test_what_a_generate_script_is_asked_instead_of_its_prompt(tmp_path: Path) -> None:
    variables = {"CHECKPOINT": "/c", "TOKENIZER_PATH": "/t", "PROMPT": "Who?"}
    script = "generate_qwen15_7b_ptd.sh"
    assert started(script, tmp_path, variables)[1].generation.prompt == ["Who?"]
    for words in (["--prompt", "a", "b"], ["--prompts-file", "-"], ["--task", "chat"], ["--predict-data", "a"]):
        _, ours = started(script, tmp_path, variables, *words)
        assert ours.generation.prompt == (["a", "b"] if words[0] == "--prompt" else None)
    job, _ = started(script, tmp_path, {**variables, **NODE, "PP": "2", "NODE_RANK": "1"})
    assert (job.options.nproc_per_node, job.options.nnodes, job.options.node_rank) == (8, 2, 1)


@pytest.mark.parametrize("size", original.LORA_CHAT)
def test_lora_chat_scripts_start_what_the_originals_started(size: str, tmp_path: Path) -> None:
    variables = {"CHECKPOINT": "/c", "TOKENIZER_PATH": "/t", "CHECKPOINT_LORA": "/a"}
    job, ours = started(f"generate_qwen15_{size}_lora_chat_ptd.sh", tmp_path, {**variables, **NODE})
    theirs = parse_settings("t", "t", original.lora_chat_flags(size))
    tensor, pipeline = original.LORA_CHAT[size]
    assert job.options.nproc_per_node * job.options.nnodes == tensor * pipeline and job.options.nproc_per_node == 8
    assert job.script == str(REPO / "inference.py")
    for section in ("parallel", "lora", "chat"):
        assert getattr(ours, section) == getattr(theirs, section)
    for field in ("max_new_tokens", "prompt", "stop", "temperature", "top_k", "top_p"):
        assert getattr(ours.generation, field) == getattr(theirs.generation, field)
    assert ours.generation.task == ["chat"] and ours.chat.inference_prompt_type == "alpaca"
    assert (ours.train.seq_length, ours.train.seed, ours.train.precision) == (8192, 42, "bf16")
    assert (ours.checkpoint.load, ours.data.tokenizer_name_or_path) == ("/c", "/t")
    # the user's own words win, as another template
    _, ours = started(f"generate_qwen15_{size}_lora_chat_ptd.sh", tmp_path, {**variables, **NODE},
                      "--inference-prompt-type", "qwen", "--task", "greedy", "--prompt", "a")
    assert ours.chat.inference_prompt_type == "qwen" and ours.generation.task == ["greedy"]


@pytest.mark.parametrize("size", FILES)
def test_evaluate_scripts_start_what_the_originals_started(size: str, tmp_path: Path) -> None:
    variables = {"CHECKPOINT": "/c", "TOKENIZER_PATH": "/t", "DATA_PATH": "/d/mmlu/test", "TASK": "mmlu"}
    job, ours = started(f"evaluate_qwen15_{FILES[size]}_ptd.sh", tmp_path, variables)
    tensor, pipeline = original.EVALUATE[size][:2] if size in original.EVALUATE else (8, 1)
    assert job.options.nproc_per_node == tensor * pipeline and job.script == str(REPO / "evaluation.py")
    assert ours.checkpoint.load == "/c" and ours.data.tokenizer_name_or_path == "/t"
    assert ours.evaluation.task_data_path == ["/d/mmlu/test"]
    # the list of the 72B had another model's layers; layouts are merged with the weights' own shape here
    theirs = parse_settings("t", "t", original.evaluate_flags(size)) if size in original.EVALUATE else ours
    assert ours.parallel == theirs.parallel
    for section, fields in (("train", ("seq_length", "seed", "precision", "micro_batch_size")),
                            ("generation", ("task", "max_new_tokens")), ("evaluation", ("chat_template",)),
                            ("data", ("tokenizer_type", "tokenizer_not_use_fast"))):
        for field in fields:
            assert getattr(getattr(ours, section), field) == getattr(getattr(theirs, section), field), field
    assert ours.model.max_position_embeddings == 8192


def test_several_tasks_on_several_replicas(tmp_path: Path) -> None:
    variables = {"CHECKPOINT": "/c", "TOKENIZER_PATH": "/t", "DATA_PATH": "/d/mmlu /d/boolq", "TASK": "mmlu boolq",
                 "DP": "4", "TP": "2"}
    job, ours = started("evaluate_qwen15_7b_ptd.sh", tmp_path, variables, "--limit", "5")
    assert job.options.nproc_per_node == 8 and ours.evaluation.limit == 5
    assert ours.generation.task == ["mmlu", "boolq"] and ours.evaluation.task_data_path == ["/d/mmlu", "/d/boolq"]
    assert "max_new_tokens" not in ours.given
    _, ours = started("evaluate_qwen15_7b_ptd.sh", tmp_path, {**variables, "TASK": "mmlu", "DATA_PATH": "/my data"})
    assert ours.evaluation.task_data_path == ["/my data"]


@pytest.mark.parametrize("size", original.TUNE)
@pytest.mark.parametrize("middle", ["", "_lora"])
def test_lora_scripts_start_what_the_originals_started(size: str, middle: str, tmp_path: Path) -> None:
    job, ours = started(f"tune_qwen15_{size}{middle}_ptd.sh", tmp_path, {**PATHS, **NODE})
    theirs = parse_settings("t", "t", original.tune_flags(size))
    assert job.options.nproc_per_node * job.options.nnodes == original.TUNE[size][0]
    assert ours.train.eval_interval == ours.checkpoint.save_interval == 5000  # not in the list kept here
    for section in ("parallel", "train", "optimizer", "lora"):
        for field, value in vars(getattr(theirs, section)).items():
            if field not in ("distributed_backend", "finetune", "eval_interval"):
                assert getattr(getattr(ours, section), field) == value, field


@pytest.mark.parametrize("size", FILES)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_tune_scripts(size: str, kind: str, tmp_path: Path) -> None:
    variables = {name: value for name, value in PATHS.items() if name != "CKPT_LOAD_DIR"} | {"CKPT_PATH": "/base"}
    job, ours = started(f"tune_qwen15_{FILES[size]}_{kind}_ptd.sh", tmp_path, {**variables, **NODE})
    assert job.script == str(REPO / "pretrain_gpt.py") and ours.model.model == f"qwen15-{size}"
    assert ours.data_kind == "instruction" and ours.checkpoint.load == "/base" and ours.checkpoint.save == "/s"
    assert (ours.lora.lora_target_modules is not None) == (kind == "lora")
    parallel = ours.parallel
    ranks = job.options.nproc_per_node * job.options.nnodes
    assert ranks % (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size) == 0
    if kind == "full":
        _, pretrain = started(f"pretrain_qwen15_{FILES[size]}_ptd.sh", tmp_path, {**PATHS, **NODE})
        assert (ours.parallel, ours.optimizer) == (pretrain.parallel, pretrain.optimizer)


def test_adapters_in_the_save_folder_do_not_replace_the_weights(tmp_path: Path) -> None:
    save = tmp_path / "save"
    save.mkdir()
    (save / "latest_checkpointed_iteration.txt").write_text("7")
    _, ours = started("tune_qwen15_7b_lora_ptd.sh", tmp_path, {**PATHS, "CKPT_SAVE_DIR": str(save)})
    assert ours.checkpoint.load == "/l" and ours.checkpoint.save == str(save)
    assert not ours.train.finetune and ours.checkpoint.load_optim
    variables = {name: value for name, value in PATHS.items() if name != "CKPT_LOAD_DIR"}
    asked = run("tune_qwen15_7b_lora_ptd.sh", tmp_path, {**variables, "CKPT_SAVE_DIR": str(save)})
    assert asked.returncode == 2 and "export CKPT_LOAD_DIR=" in asked.stderr


def test_variables_and_arguments_win(tmp_path: Path) -> None:
    job, settings = started(
        "pretrain_qwen15_72b_ptd.sh", tmp_path,
        {**PATHS, "TP": "2", "PP": "2", "VPP": "1", "NPUS_PER_NODE": "4", "NNODES": "1", "MBS": "2", "GBS": "8",
         "SEQ_LEN": "64", "TRAIN_ITERS": "3", "LR": "1e-3", "MASTER_PORT": "1234", "LOG_DIR": "x y",
         "CKPT_SAVE_DIR": "/a b"},
        "--model", "tiny/config.json", "--fp32", "--seed", "5")
    parallel, train = settings.parallel, settings.train
    assert (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size,
            parallel.num_layers_per_virtual_pipeline_stage) == (2, 2, 1)
    assert (train.micro_batch_size, train.global_batch_size, train.seq_length, train.train_iters, train.seed,
            train.precision) == (2, 8, 64, 3, 5, "fp32")
    assert settings.model.model == "tiny/config.json" and settings.optimizer.lr == 1e-3
    assert settings.checkpoint.save == "/a b"
    options = job.options
    assert (options.nproc_per_node, options.nnodes, options.master_port, options.log_dir) == (4, 1, 1234, "x y")


def test_empty_variables_mean_none(tmp_path: Path) -> None:
    _, settings = started("pretrain_qwen15_32b_ptd.sh", tmp_path,
                          {**PATHS, **NODE, "VPP": "", "CKPT_LOAD_DIR": "", "CKPT_SAVE_DIR": ""})
    assert settings.parallel.num_layers_per_virtual_pipeline_stage is None
    assert settings.checkpoint.load is None and settings.checkpoint.save is None
    assert not settings.train.finetune and settings.checkpoint.load_optim


def test_a_begun_run_continues_with_its_optimizer(tmp_path: Path) -> None:
    save = tmp_path / "save"
    save.mkdir()
    (save / "latest_checkpointed_iteration.txt").write_text("7")
    variables = {name: value for name, value in PATHS.items() if name != "CKPT_LOAD_DIR"}
    _, settings = started("pretrain_qwen15_7b_ptd.sh", tmp_path, {**variables, "CKPT_SAVE_DIR": str(save)})
    assert settings.checkpoint.load == settings.checkpoint.save == str(save)
    assert settings.checkpoint.load_optim and settings.checkpoint.load_rng and not settings.train.finetune


def test_a_blend_and_a_path_with_a_space(tmp_path: Path) -> None:
    script = "pretrain_qwen15_7b_ptd.sh"
    _, settings = started(script, tmp_path, {**PATHS, "DATA_PATH": "0.3 /d/a 0.7 /d/b"})
    assert settings.data.data_path == ["0.3", "/d/a", "0.7", "/d/b"]
    (tmp_path / "my data.idx").touch()
    _, settings = started(script, tmp_path, {**PATHS, "DATA_PATH": "my data"})
    assert settings.data.data_path == ["my data"]


def test_mock_data_needs_neither_data_nor_tokenizer(tmp_path: Path) -> None:
    _, settings = started("pretrain_qwen15_7b_ptd.sh", tmp_path, PATHS, "--mock-data")
    data = settings.data
    assert data.data_path is None and data.tokenizer_name_or_path is None and data.split is None


@pytest.mark.parametrize("script, names", [
    ("pretrain_qwen15_7b_ptd.sh", {"TOKENIZER_PATH", "DATA_PATH", "CKPT_LOAD_DIR", "CKPT_SAVE_DIR"}),
    ("pretrain_qwen15_72b_ptd.sh", {"TOKENIZER_PATH", "DATA_PATH", "CKPT_LOAD_DIR", "CKPT_SAVE_DIR", "NODE_RANK",
                                    "MASTER_ADDR"}),
    ("evaluate_qwen15_7b_ptd.sh", {"TOKENIZER_PATH", "CHECKPOINT", "DATA_PATH", "TASK"}),
    ("generate_qwen15_7b_ptd.sh", {"TOKENIZER_PATH", "CHECKPOINT"}),
    ("generate_qwen15_32b_lora_chat_ptd.sh", {"TOKENIZER_PATH", "CHECKPOINT", "CHECKPOINT_LORA"}),
    ("generate_qwen15_72b_lora_chat_ptd.sh", {"TOKENIZER_PATH", "CHECKPOINT", "CHECKPOINT_LORA", "NODE_RANK",
                                              "MASTER_ADDR"})])
def test_missing_variables_are_shown_as_they_must_be_set(script: str, names: set[str], tmp_path: Path) -> None:
    result = run(script, tmp_path, {})
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert lines[0].startswith("error: variables are missing")
    assert {line.split("=")[0] for line in lines[1:]} == {f"  export {name}" for name in names}
    assert list(tmp_path.iterdir()) == []


def test_ascends_environment_is_sourced_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "set_env.sh").write_text('export ASCEND_HOME="here$NEVER_SET"\n')
    started("pretrain_qwen15_7b_ptd.sh", tmp_path, {**PATHS, "ASCEND_SET_ENV": str(tmp_path / "set_env.sh")})
    assert recorded_environment(tmp_path)["ASCEND_HOME"] == "here"


def test_the_memory_setting_of_torch_npu_gives_way_to_torchs(tmp_path: Path) -> None:
    """torch_npu ends a run that has both variables."""
    for name, given in (("without", {}), ("with", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"})):
        (tmp_path / name).mkdir()
        started("pretrain_qwen15_7b_ptd.sh", tmp_path / name, {**PATHS, **given})
        found = recorded_environment(tmp_path / name).get("PYTORCH_NPU_ALLOC_CONF")
        assert found == (None if given else "expandable_segments:True")


RANKS = {"0.5b": "8 = tensor 1 x pipeline 1 x data 8", "1.8b": "8 = tensor 1 x pipeline 1 x data 8",
         "4b": "8 = tensor 1 x pipeline 2 x data 4", "7b": "8 = tensor 8 with sequence parallel x pipeline 1 x data 1",
         "14b": "8 = tensor 4 with sequence parallel x pipeline 2 x data 1",
         "32b": "32 = tensor 8 with sequence parallel x pipeline 4 x 8 chunks x data 1",
         "72b": "64 = tensor 8 with sequence parallel x pipeline 8 x 5 chunks x data 1",
         "110b": "64 = tensor 8 with sequence parallel x pipeline 8 x 5 chunks x data 1"}


@pytest.mark.parametrize("size", FILES)
def test_check_of_every_script_on_this_machine(size: str, tmp_path: Path) -> None:
    """One plain process and nothing but the script: no data, no tokenizer, no devices."""
    result = run(f"pretrain_qwen15_{FILES[size]}_ptd.sh", tmp_path, {}, "--mock-data", "--check")
    assert result.returncode == 0, result.stderr
    assert result.stderr == "" and f"ranks       {RANKS[size]}" in result.stdout
    assert f"{PRESETS[f'qwen15-{size}'].num_parameters:,} parameters" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_check_shows_the_plan_and_then_every_problem(tmp_path: Path) -> None:
    result = run("pretrain_qwen15_7b_ptd.sh", tmp_path, {"TP": "3", "GBS": "0"}, "--mock-data", "--check")
    assert result.returncode == 2
    for part in ("--global-batch-size 0", "--tensor-model-parallel-size 3", "world size 8"):
        assert part in result.stderr
    result = run("pretrain_qwen15_7b_ptd.sh", tmp_path, {}, "--mock-data", "--check", "--device", "cpu")
    assert result.returncode == 2 and "memory: 8 ranks on this host need at least" in result.stderr
    assert "ranks       8 = tensor 8" in result.stdout
