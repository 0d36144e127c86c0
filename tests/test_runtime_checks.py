"""Wrong inputs: each is one clear sentence with exit code 2, and nothing is written. Right ones become a Run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_folders import make_hf
from data_helpers import make_tokenizer, random_documents, write_documents

from modellink.checkpoint.convert import main as convert
from modellink.checks.wishes import wish_notices
from modellink.config import ConfigError, run_command
from modellink.config.settings import parse_settings
from modellink.data.indexed import IndexedWriter
from modellink.device.cpu import CpuDevice
from modellink.models.forms import situation_of
from modellink.models.run import Run
from modellink.ops.forms import Situation
from modellink.ops.npu import attention as npu_attention
from modellink.ops.parallel_linear import torch_accumulate
from modellink.ops.table import choose
from modellink.parallel.dims import ParallelDims
from modellink.runtime import prepare_run

WORDS = 320
SIZES = {"layers": 4, "hidden": 24, "ffn": 40, "heads": 6, "groups": 2, "vocab": WORDS}
TRAIN = "--train-iters 4 --lr 1e-3 --seq-length 32 --device cpu"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in HF and Megatron form, data and a tokenizer, and broken copies of them."""
    root = tmp_path_factory.mktemp("place")
    make_hf(root / "hf", **SIZES)
    common = ["--from", "hf", "--to", "megatron", "--load-dir", str(root / "hf")]
    assert run_command(convert, [*common, "--save-dir", str(root / "mg"), "--target-tensor-parallel-size", "2"]) == 0
    make_hf(root / "other" / "hf", **{**SIZES, "layers": 2})
    assert run_command(convert, ["--from", "hf", "--to", "megatron", "--load-dir", str(root / "other" / "hf"),
                                 "--save-dir", str(root / "other" / "mg")]) == 0
    # a checkpoint with optimizer state
    shutil.copytree(root / "mg", root / "resume")
    for rank in ("mp_rank_00", "mp_rank_01"):
        (root / "resume" / "iter_0000001" / rank / "distrib_optim.pt").write_bytes(b"state")
    make_tokenizer(root / "tokenizer", WORDS)
    make_tokenizer(root / "large_tokenizer", WORDS + 40)
    (root / "empty").mkdir()
    (root / "html_tokenizer").mkdir()
    (root / "html_tokenizer" / "tokenizer.json").write_text("<!DOCTYPE html><html></html>")
    (root / "data").mkdir()
    write_documents(root / "data" / "book_text_document", random_documents(20, 0, vocab_size=WORDS))
    with IndexedWriter(root / "nothing"):
        pass
    for name in ("cut", "corrupt"):
        for suffix in (".bin", ".idx"):
            shutil.copy(root / "data" / f"book_text_document{suffix}", root / f"{name}{suffix}")
    (root / "cut.bin").write_bytes((root / "cut.bin").read_bytes()[:-4])
    (root / "corrupt.idx").write_bytes(b"x" * 200)
    return root


def run_program(line: str, place: Path, world: int, program: str) -> Run:
    return prepare_run(parse_settings("pretrain_gpt.py", "test", line.replace("@", str(place)).split()), world,
                       program)  # type: ignore[arg-type]


def files_below(folder: Path) -> set[tuple[str, int]]:
    return {(str(path), path.stat().st_mtime_ns) for path in folder.rglob("*")}


MODEL = "--model @/hf/config.json"
MOCK = f"{TRAIN} {MODEL} --mock-data"
REAL = f"{TRAIN} {MODEL} --tokenizer-name-or-path @/tokenizer --data-path"
DATA = "@/data/book_text_document"
BOOK = f"{REAL} {DATA}"
GENERATE = "--tokenizer-name-or-path @/tokenizer --device cpu --load"

# what is wrong: (flags, ranks, program, parts of the sentence)
WRONG: dict[str, tuple[str, int, str, tuple[str, ...]]] = {
    "heads and groups, not divisible by TP": (f"{MOCK} --tensor-model-parallel-size 4", 4, "train", (
        "--tensor-model-parallel-size 4", "attention heads 6, key/value groups 2", "choose one of 1, 2.")),
    "layers, not divisible by PP": (f"{MOCK} --pipeline-model-parallel-size 3", 3, "train", (
        "4 layers", "--pipeline-model-parallel-size 3", "choose a divisor")),
    "layers, not divisible by VPP": (
        f"{MOCK} --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3 --global-batch-size 2", 2,
        "train", ("--num-layers-per-virtual-pipeline-stage 3", "2 layers of a stage")),
    "VPP without PP": (f"{MOCK} --num-layers-per-virtual-pipeline-stage 1", 1, "train", (
        "--num-layers-per-virtual-pipeline-stage 1", "--pipeline-model-parallel-size of at least 2")),
    "wrong world size": (f"{MOCK} --tensor-model-parallel-size 2", 3, "train", ("world size 3", "tensor 2")),
    "TP of 0": (f"{MOCK} --tensor-model-parallel-size 0", 1, "train", (
        "--tensor-model-parallel-size 0", "at least 1")),
    "global batch, not divisible": (f"{MOCK} --micro-batch-size 2 --global-batch-size 7", 2, "train", (
        "--global-batch-size 7", "--micro-batch-size 2 x 2 data parallel ranks = 4")),
    "microbatches, not divisible by PP under VPP": (
        f"{MOCK} --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 3", 2,
        "train", ("--global-batch-size 3 gives 3 microbatches", "--pipeline-model-parallel-size 2")),
    "ramp-up that misses the batch": (f"{MOCK} --global-batch-size 8 --rampup-batch-size 2 4 100", 1, "train", (
        "--rampup-batch-size 2 4 100", "--global-batch-size 8")),
    "ramp-up that does not split": (f"{MOCK} --global-batch-size 8 --rampup-batch-size 2 3 100", 2, "train", (
        "--rampup-batch-size 2 3 100", "multiples of 2")),
    "ramp-up without numbers": (f"{MOCK} --rampup-batch-size a b c", 1, "train", ("--rampup-batch-size a b c",)),
    "sequence parallel that does not split": (
        f"{MOCK} --seq-length 33 --tensor-model-parallel-size 2 --sequence-parallel", 2, "train", (
            "--seq-length 33", "--tensor-model-parallel-size 2")),
    "longer than the positions": (f"{MOCK} --seq-length 513", 1, "train", (
        "--seq-length 513", "512 positions", "--max-position-embeddings")),
    "padded vocabulary too small": (f"{MOCK} --padded-vocab-size 300", 1, "train", (
        "--padded-vocab-size 300", "320 vocabulary rows")),
    "padded vocabulary, not divisible by TP": (
        f"{MOCK} --padded-vocab-size 321 --tensor-model-parallel-size 2", 2, "train", (
            "--padded-vocab-size 321", "use 322")),
    "no learning rate": (f"--train-iters 4 --seq-length 32 --mock-data {MODEL}", 1, "train", ("--lr is missing",)),
    "no iterations": (f"--lr 1 --seq-length 32 --mock-data {MODEL}", 1, "train", ("--train-iters is missing",)),
    "no sequence length": (f"--lr 1 --train-iters 32 --mock-data {MODEL}", 1, "train", ("--seq-length is missing",)),
    "no model": (f"{TRAIN} --mock-data", 1, "train", ("--model is missing", "--num-layers")),
    "no data": (f"{TRAIN} {MODEL} --tokenizer-name-or-path @/tokenizer", 1, "train", (
        "--data-path is missing", "--mock-data")),
    "mock and real data": (f"{BOOK} --mock-data", 1, "train", ("--mock-data and --data-path",)),
    "two kinds of real data": (f"{BOOK} --train-data-path {DATA}", 1, "train", ("--data-path and --train-data-path",)),
    "tokenizer folder without files": (f"{BOOK} --tokenizer-name-or-path @/empty", 1, "train", (
        "empty: no tokenizer files",)),
    "no tokenizer folder": (f"{BOOK} --tokenizer-name-or-path @/tokeniser", 1, "train", (
        "tokeniser: no such tokenizer folder", "did you mean", "/tokenizer?")),
    "tokenizer that is a web page": (f"{BOOK} --tokenizer-name-or-path @/html_tokenizer", 1, "train", (
        "tokenizer.json: this is an HTML page",)),
    "more words than rows": (f"{BOOK} --tokenizer-name-or-path @/large_tokenizer", 1, "train", (
        "the tokenizer has 360 words", "320 vocabulary rows")),
    "data set in a sibling folder": (f"{REAL} @/dta/book_text_document", 1, "train", (
        "dta/book_text_document: no such data set", "did you mean", "/data/book_text_document?")),
    "truncated .bin": (f"{REAL} @/cut", 1, "train", ("cut.bin", "cut short")),
    "corrupt .idx": (f"{REAL} @/corrupt", 1, "train", ("corrupt.idx: not a valid index",)),
    "no documents": (f"{REAL} @/nothing", 1, "train", ("nothing: the data set holds no document",)),
    "half a blend": (f"{REAL} 0.3 {DATA} {DATA}", 1, "train", ("--data-path 0.3", "a weight before every prefix")),
    "split without training": (f"{BOOK} --split 0,50,50", 1, "train", ("--split 0,50,50", "is 0")),
    "split that is none": (f"{BOOK} --split most", 1, "train", ("--split most", "969,30,1")),
    "no such checkpoint": (f"{BOOK} --load @/mgg", 1, "train", ("--load", "mgg: no such folder", "did you mean")),
    "folder without a checkpoint": (f"{BOOK} --load @/empty --save @/new", 1, "train", (
        "--load", "empty: no Megatron checkpoint")),
    "checkpoint one folder deeper": (f"{BOOK} --load @/other", 1, "train", ("--load", "give", "/other/mg")),
    "checkpoint of another architecture": (f"{BOOK} --load @/other/mg", 1, "train", (
        "--model: num_layers is 4", "but 2 in the weights", "other/mg")),
    "flag against the checkpoint": (f"{BOOK} --load @/mg --norm-epsilon 1e-5", 1, "train", (
        "--norm-epsilon 1e-05 contradicts", "rms_norm_eps is 1e-06")),
    "optimizer of another layout": (f"{BOOK} --load @/resume", 1, "train", (
        "optimizer state is of layout TP2 PP1", "this run has TP1 PP1", "--finetune or --no-load-optim")),
    "param gather alone": (f"{MOCK} --overlap-param-gather", 1, "train", (
        "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce",)),
    "instruction data": (f"{MOCK} --is-instruction-dataset", 1, "train", (
        "--mock-data with --is-instruction-dataset",)),
    "LoRA without targets": (f"{MOCK} --lora-r 8 --lora-alpha 4", 1, "train", (
        "--lora-r, --lora-alpha without --lora-target-modules", "all-linear")),
    "evaluation flags": (f"{MOCK} --no-chat-template", 1, "train", ("--no-chat-template: is for evaluation.py",)),
    "negative rate": (f"{MOCK} --lr -1", 1, "train", ("--lr -1", "above 0")),
    "micro batch of 0": (f"{MOCK} --micro-batch-size 0", 1, "train", ("--micro-batch-size 0", "at least 1")),
    "min above peak": (f"{MOCK} --min-lr 1", 1, "train", ("--min-lr 1 is above --lr 0.001",)),
    "two warm-ups": (f"{MOCK} --lr-warmup-fraction 0.1 --lr-warmup-iters 1", 1, "train", ("say the same thing twice",)),
    "warm-up longer than the run": (f"{MOCK} --lr-warmup-iters 5", 1, "train", ("--lr-warmup-iters 5", "4 steps")),
    "saves without a folder": (f"{MOCK} --save-interval 5", 1, "train", ("--save-interval 5 without --save",)),
    "full recompute without a method": (
        f"{MOCK} --recompute-granularity full --recompute-num-layers 1", 1, "train", ("--recompute-method",)),
    "method without full recompute": (f"{MOCK} --recompute-method block", 1, "train", ("--recompute-method block",)),
    "recompute of too many layers": (
        f"{MOCK} --recompute-granularity full --recompute-method uniform --recompute-num-layers 5", 1, "train", (
            "--recompute-num-layers 5", "4 layers")),
    "two kinds of recompute": (
        f"{MOCK} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
        "--recompute-activations", 1, "train", ("--recompute-activations means",)),
    "a device that is not here": (f"{MOCK} --device npu", 1, "train", ("--device npu", "--device auto")),
    "generation without weights": ("--tokenizer-name-or-path @/tokenizer --device cpu", 1, "generate", (
        "--load is missing",)),
    "generation without a tokenizer": ("--load @/mg --device cpu", 1, "generate", (
        "--tokenizer-name-or-path is missing",)),
    "generation on ranks that make no replicas": (f"{GENERATE} @/mg --tensor-model-parallel-size 2", 3, "generate", (
        "world size 3", "multiple of 2")),
    "generation at temperature 0": (f"{GENERATE} @/mg --temperature 0", 1, "generate", ("--temperature 0",)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_sentence(name: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line, world, program, parts = WRONG[name]
    before = files_below(place)
    code = run_command(lambda argv: run_program(line, place, world, program) and 0)
    said = capfd.readouterr().err.strip().split("\n")
    assert code == 2 and len(said) == 1, said
    assert said[0].startswith("error: ") and said[0].endswith((".", "?"))
    for part in parts:
        assert part in said[0]
    assert files_below(place) == before


def test_all_problems_come_in_one_message(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = (f"--seq-length 31 {MODEL} --tensor-model-parallel-size 2 --sequence-parallel --global-batch-size 3 "
            "--data-path @/nowhere --load @/empty --overlap-param-gather")
    assert run_command(lambda argv: run_program(line, place, 4, "train") and 0) == 2
    said = capfd.readouterr().err
    for part in ("--train-iters", "--lr", "--seq-length 31", "--global-batch-size 3", "nowhere", "empty",
                 "--overlap-param-gather"):
        assert part in said
    assert said.count("error: ") == 7


def test_a_right_run(place: Path) -> None:
    run = run_program(f"{BOOK} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel "
                      "--num-layers-per-virtual-pipeline-stage 1 --load @/mg --save @/new "
                      "--make-vocab-size-divisible-by 64 --max-position-embeddings 64", place, 8, "train")
    assert (run.dims.tensor, run.dims.pipeline, run.dims.chunks, run.dims.data) == (2, 2, 2, 2)
    assert run.dims.sequence_parallel and run.padded_vocab_size == 384
    assert run.global_batch_size == 4  # one for each data parallel rank, PP of them
    assert run.model.num_layers == 4 and run.origins["num_layers"].endswith("/mg")
    assert run.model.max_position_embeddings == 64 and run.seq_length == 32
    assert run.notices == () and not (place / "new").exists()


def test_the_save_folder_of_a_run_not_yet_begun_may_be_loaded(place: Path) -> None:
    run = run_program(f"{BOOK} --load @/empty --save @/empty", place, 1, "train")
    assert run.origins["num_layers"].endswith(".json")


def test_a_resume_in_the_same_layout_and_ways_out_of_another(place: Path) -> None:
    run_program(f"{BOOK} --load @/resume --tensor-model-parallel-size 2", place, 2, "train")
    run_program(f"{BOOK} --load @/resume --finetune", place, 1, "train")
    run_program(f"{BOOK} --load @/resume --no-load-optim", place, 1, "train")


def test_generation_takes_everything_from_the_checkpoint(place: Path) -> None:
    run = run_program(f"{GENERATE} @/mg --tensor-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
                      place, 2, "generate")
    assert run.model.num_layers == 4 and run.dims.tensor == 2 and run.dims.chunks == 1
    assert run.seq_length == 512
    assert run.notices == ("--num-layers-per-virtual-pipeline-stage has no effect on generation.",)


def test_wishes_that_have_no_effect_are_one_line_each(place: Path) -> None:
    run = run_program(f"{MOCK} --use-flash-attn --use-mc2 --use-fused-rmsnorm --sequence-parallel "
                      "--distributed-backend nccl --no-use-mcore-models", place, 1, "train")
    assert len(run.notices) == 4
    assert run.notices[0].startswith("--use-flash-attn, --use-fused-rmsnorm, --use-mc2: not available on cpu; used")
    assert "--no-use-mcore-models has no effect" in run.notices[1]
    assert run.notices[2].startswith("--sequence-parallel has no effect")
    assert run.notices[3] == "--distributed-backend nccl: cpu uses its own, gloo."
    assert run_program(f"{MOCK} --distributed-backend gloo", place, 1, "train").notices == ()


@pytest.mark.parametrize("device, words, said", [
    ("cpu", "--no-gradient-accumulation-fusion", [
        "--no-gradient-accumulation-fusion has no effect on cpu: weight gradients are always added"]),
    # here it is off, as asked
    ("cpu", "--no-gradient-accumulation-fusion --compile layer", []), ("npu", "--no-gradient-accumulation-fusion", []),
    ("cpu", "--gradient-accumulation-fusion", []), ("cpu", "", []), ("cpu", "--no-use-flash-attn", []),
    ("npu", "--no-use-flash-attn --no-use-fused-swiglu", [
        "--no-use-flash-attn has no effect on npu: attention takes its fused form",
        "--no-use-fused-swiglu has no effect on npu: SwiGLU takes its fused form"]),
    ("", "--no-gradient-accumulation-fusion --no-use-flash-attn", [])])
def test_a_kernel_that_runs_in_any_case_is_not_switched_off_in_silence(device: str, words: str, said: list[str]
                                                                       ) -> None:
    lines = wish_notices(parse_settings("t", "t", words.split()), ParallelDims(), device, "")
    assert [line[:len(start)] for line, start in zip(lines, said, strict=True)] == said
    # and the table agrees: without the wish the form is there
    for field, operation in (("gradient_accumulation_fusion", "weight_gradient"), ("use_flash_attn", "attention")):
        if any(line.startswith("--no-" + field.replace("_", "-")) for line in lines):
            choice = next(choice for choice in choose(Situation(device)) if choice.operation == operation)
            assert choice.form.run in (torch_accumulate, npu_attention.attention)


def test_the_biggest_token_id_counts_not_the_number_of_words(place: Path, tmp_path: Path,
                                                             capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(place / "tokenizer", tmp_path / "holes")
    path = tmp_path / "holes" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][-1]["id"] = 999
    path.write_text(json.dumps(content))
    line = f"{BOOK} --tokenizer-name-or-path {tmp_path / 'holes'}"
    assert run_command(lambda argv: run_program(line, place, 1, "train") and 0) == 2
    assert "the tokenizer has 1000 words" in capfd.readouterr().err


def test_a_checkpoint_that_knows_only_padded_rows_takes_the_models(tmp_path: Path, place: Path) -> None:
    """Megatron-LM's own checkpoints have no record of the true vocabulary; --model states it."""
    make_hf(tmp_path / "hf", **{**SIZES, "vocab": WORDS + 1})
    assert run_command(convert, ["--from", "hf", "--to", "megatron", "--load-dir", str(tmp_path / "hf"), "--save-dir",
                                 str(tmp_path / "mg"), "--target-tensor-parallel-size", "2"]) == 0
    for path in (tmp_path / "mg").rglob("model_optim_rng.pt"):
        state = torch.load(path, weights_only=False)
        for name in [name for name in vars(state["args"]) if "vocab" in name and name != "padded_vocab_size"]:
            delattr(state["args"], name)
        torch.save(state, path)
    line = f"{TRAIN} --tokenizer-name-or-path @/tokenizer --data-path {DATA} --load {tmp_path / 'mg'}"
    assert run_program(line, place, 1, "train").model.vocab_size == WORDS + 2
    assert run_program(f"{line} --vocab-size {WORDS + 1}", place, 1, "train").model.vocab_size == WORDS + 1
    run = run_program(f"{line} --model {tmp_path / 'hf'}", place, 1, "train")
    assert run.model.vocab_size == WORDS + 1 and run.padded_vocab_size == WORDS + 1


WIDE = {"hidden_size": 1600, "num_attention_heads": 2, "num_key_value_heads": 2}  # heads of 800
LARGEST = {"hidden_size": 1800, "num_attention_heads": 2, "num_key_value_heads": 2}  # heads of 900


@pytest.mark.parametrize("changes, world, words, said", [
    (WIDE, 1, "--use-flash-attn --bf16", "--use-flash-attn: npu_fusion_attention cannot compute this run: it takes "
                                         "head sizes up to 768 and not 800"),
    (LARGEST, 1, "--use-fused-rotary-pos-emb", "--use-fused-rotary-pos-emb: npu_rotary_mul cannot compute this run: it "
                                               "takes even head sizes below 896 and not 900"),
    ({}, 2, "--use-mc2 --bf16 --tensor-model-parallel-size 2", "--use-mc2: MC2 cannot compute this run: it needs "
                                                               "--sequence-parallel"),
    ({"hidden_size": 768, "intermediate_size": 1024}, 2,
     "--use-mc2 --fp32 --tensor-model-parallel-size 2 --sequence-parallel",
     "--use-mc2: MC2 cannot compute this run: it takes float16, bfloat16 and not float32"),
    ({}, 2, "--use-mc2 --bf16 --tensor-model-parallel-size 2 --sequence-parallel",
     "--use-mc2: MC2 cannot compute this run: it takes products over 256 to 65534 features and not over 96")])
def test_a_fused_form_that_cannot_compute_the_run(changes: dict, world: int, words: str, said: str,
                                                  tmp_path: Path) -> None:
    from tiny import tiny_config

    tiny_config(**changes).save_pretrained(tmp_path)
    line = f"--model {tmp_path} --mock-data --seq-length 16 --train-iters 1 --lr 1 {words}".split()

    def prepare(device: str) -> None:
        prepare_run(parse_settings("t", "t", [*line, "--device", device]), world, "train", elsewhere=True)

    with pytest.raises(ConfigError) as error:
        prepare("npu")
    (sentence,) = error.value.problems
    assert sentence.startswith(said) and "or leave --use-" in sentence
    prepare("cpu")  # where a wish is only a wish


@pytest.mark.parametrize("changes, words, said", [
    ({}, "--use-flash-attn", "--use-flash-attn: torch's attention cannot compute this run: flash attention takes "
                             "float16, bfloat16 and not float32"),
    (WIDE, "--use-flash-attn --bf16", "--use-flash-attn: torch's attention cannot compute this run: flash attention "
                                      "takes head sizes up to 192 that 8 divides, and not 800"),
    ({"intermediate_size": 65544}, "--use-fused-swiglu", "--use-fused-swiglu: liger-kernel cannot compute this run: it "
                                                         "takes rows of up to 65536 features and not 65544")])
def test_the_rule_of_flags_holds_on_cuda(changes: dict, words: str, said: str, tmp_path: Path) -> None:
    from tiny import tiny_config

    tiny_config(**changes).save_pretrained(tmp_path)
    line = f"--model {tmp_path} --mock-data --seq-length 16 --train-iters 1 --lr 1 --device cuda".split()

    def prepare(*words: str) -> Run:
        return prepare_run(parse_settings("t", "t", [*line, *words]), 1, "train", elsewhere=True)

    with pytest.raises(ConfigError) as error:
        prepare(*words.split())
    (sentence,) = error.value.problems
    assert sentence.startswith(said) and "or leave --use-" in sentence
    prepare()  # without the flag another form is taken
    if not changes:
        prepare("--use-flash-attn", "--use-fused-rmsnorm", "--use-fused-swiglu", "--use-fused-rotary-pos-emb", "--bf16")


class Here(CpuDevice):
    """An NPU of a product, as far as checks before the start ask."""

    name = "npu"
    product = ""

    def product_name(self) -> str:
        return self.product


@pytest.mark.parametrize("product, words, said", [
    ("Ascend910A", "--bf16", "--bf16: Ascend910A has no bf16 (Huawei at the launch"),
    ("Ascend910A", "--fp16 --use-flash-attn", None), ("Ascend910B2", "--bf16", None),
    # the pages name other numbers of ranks for other products
    ("Ascend910B2", "--bf16 --use-mc2", "--use-mc2: MC2 cannot compute this run: it takes 2, 4, 8 tensor parallel"),
    ("Ascend910_9392", "--bf16 --use-mc2", None),
    # a kernel that the product has not got is a wish, as on a device without it
    ("Ascend950DT_9582", "--bf16 --use-mc2", None)])
def test_what_the_product_that_is_here_cannot_do(product: str, words: str, said: str | None, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny import tiny_config

    from modellink.device import select

    monkeypatch.setitem(select._KINDS, "npu", Here)
    monkeypatch.setattr(Here, "product", product)
    tiny_config(hidden_size=8192, num_attention_heads=64, num_key_value_heads=64, intermediate_size=8192,
                num_hidden_layers=1).save_pretrained(tmp_path)
    line = (f"--model {tmp_path} --mock-data --seq-length 16 --train-iters 1 --lr 1 --device npu --sequence-parallel "
            f"--tensor-model-parallel-size 16 {words}")
    settings = parse_settings("t", "t", line.split())
    if said is None:
        prepare_run(settings, 16, "train")
        return
    with pytest.raises(ConfigError) as error:
        prepare_run(settings, 16, "train")
    (sentence,) = error.value.problems
    assert sentence.startswith(said)


def test_symmetric_memory_is_for_sequence_parallel_layers_on_cuda(tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused where the flag could have an effect; elsewhere a line says what is used. A rank knows its node."""
    from tiny import tiny_config

    tiny_config().save_pretrained(tmp_path)
    line = (f"--model {tmp_path} --mock-data --seq-length 16 --train-iters 1 --lr 1 --use-symm-mem "
            "--tensor-model-parallel-size 2 --device").split()

    def prepare(*words: str) -> Run:
        return prepare_run(parse_settings("t", "t", [*line, *words]), 2, "train", elsewhere=True)

    with pytest.raises(ConfigError) as error:
        prepare("cuda")
    (sentence,) = error.value.problems
    assert sentence.startswith("--use-symm-mem: torch's symmetric memory cannot compute this run: it needs "
                               "--sequence-parallel; ") and sentence.endswith("or leave --use-symm-mem out.")
    run = prepare("cuda", "--sequence-parallel")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    situation = situation_of(run, CpuDevice())
    assert run.notices == () and situation.wishes == {"use_symm_mem"} and situation.node_ranks == 4
    for device in ("cpu", "npu"):
        assert prepare(device, "--sequence-parallel").notices == (
            f"--use-symm-mem: not available on {device}; used instead: matrix product, then its communication.",)
