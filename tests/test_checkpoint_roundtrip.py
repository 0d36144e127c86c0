"""The rule table: every layout equals a packing written by hand, and every way round is bit-exact."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from checkpoint_folders import assert_same, load_hf, make_hf, packed_by_hand
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modellink.checkpoint.convert import main
from modellink.checkpoint.hf import open_hf
from modellink.checkpoint.layout import Layout
from modellink.checkpoint.megatron import open_megatron, read_chunk
from modellink.config.model import ModelConfig


def convert(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def to_megatron(source: Path, target: Path, layout: Layout, layers: int, *more: object, loader: str = "hf") -> None:
    virtual = ()
    if layout.chunks > 1:
        virtual = ("--num-layers-per-virtual-pipeline-stage", layout.layers_per_chunk(layers))
    convert(
        "--from",
        loader,
        "--to",
        "megatron",
        "--load-dir",
        source,
        "--save-dir",
        target,
        "--target-tensor-parallel-size",
        layout.tensor,
        "--target-pipeline-parallel-size",
        layout.pipeline,
        *virtual,
        *more,
    )


@st.composite
def models_and_layouts(draw: st.DrawFn) -> tuple[dict, list[Layout], torch.dtype, int]:
    """A model of odd sizes, two layouts it can be cut in, a dtype and a divisor of the vocabulary."""
    tensors = [draw(st.sampled_from([1, 2, 3, 4])) for _ in range(2)]
    pipes = [draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (2, 3), (3, 2), (4, 1)])) for _ in range(2)]
    both = torch.tensor([1])
    for size in tensors:
        both = torch.lcm(both, torch.tensor([size]))
    groups = int(both) * draw(st.integers(1, 2))
    heads = groups * draw(st.integers(1, 3))
    layers = torch.lcm(torch.tensor(pipes[0][0] * pipes[0][1]), torch.tensor(pipes[1][0] * pipes[1][1])).item()
    sizes = {
        "layers": layers * draw(st.integers(1, 2)),
        "heads": heads,
        "groups": groups,
        "hidden": heads * draw(st.sampled_from([2, 3])),
        "ffn": int(both) * draw(st.integers(1, 5)),
        "vocab": draw(st.integers(20, 61)),
        "tie": draw(st.booleans()),
    }
    layouts = [Layout(tensor, *pipe) for tensor, pipe in zip(tensors, pipes)]
    return sizes, layouts, draw(st.sampled_from([torch.bfloat16, torch.float32])), draw(st.integers(1, 8))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(models_and_layouts())
def test_hf_to_megatron_to_megatron_to_hf_is_bit_exact(case: tuple[dict, list[Layout], torch.dtype, int]) -> None:
    sizes, (first, second), dtype, divisible_by = case
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        state = make_hf(folder / "hf", dtype, **sizes)
        to_megatron(folder / "hf", folder / "a", first, sizes["layers"], "--make-vocab-size-divisible-by", divisible_by)
        multiple = first.tensor * divisible_by
        padded = -(-sizes["vocab"] // multiple) * multiple
        assert_rank_files(folder / "a", state, first, sizes, padded)
        to_megatron(folder / "a", folder / "b", second, sizes["layers"], loader="megatron")
        assert_rank_files(folder / "b", state, second, sizes, -(-sizes["vocab"] // second.tensor) * second.tensor)
        for source in ("a", "b"):
            convert(
                "--from", "megatron", "--to", "hf", "--load-dir", folder / source, "--save-dir", folder / f"{source}-hf"
            )
            assert_same(state, load_hf(folder / f"{source}-hf"))


def assert_rank_files(folder: Path, state: dict, layout: Layout, sizes: dict, padded: int) -> None:
    """torch.load of every rank file equals the packing by hand, in keys, dtypes and bits."""
    size = sizes["layers"] // (layout.pipeline * layout.chunks)
    for tensor_rank in range(layout.tensor):
        for stage in range(layout.pipeline):
            suffix = f"_{stage:03d}" if layout.pipeline > 1 else ""
            path = folder / "iter_0000001" / f"mp_rank_{tensor_rank:02d}{suffix}" / "model_optim_rng.pt"
            saved = torch.load(path, weights_only=False)
            for chunk in range(layout.chunks):
                start = chunk * layout.pipeline * size + stage * size
                first, last = stage + chunk == 0, (stage, chunk) == (layout.pipeline - 1, layout.chunks - 1)
                head = "lm_head.weight"
                if sizes["tie"]:
                    head = "model.embed_tokens.weight" if layout.pipeline > 1 else None
                expected = packed_by_hand(
                    state,
                    list(range(start, start + size)),
                    layout.tensor,
                    tensor_rank,
                    first=first,
                    last=last,
                    padded=padded,
                    groups=sizes["groups"],
                    head=head,
                )
                assert_same(expected, saved[f"model{chunk}" if layout.chunks > 1 else "model"])
            assert ("model" in saved) == (layout.chunks == 1)
            assert saved["checkpoint_version"] == 3.0
            assert saved["iteration"] == 1
            assert saved["args"].padded_vocab_size == padded
            assert saved["args"].num_query_groups == sizes["groups"]
            assert saved["args"].virtual_pipeline_model_parallel_size == (layout.chunks if layout.chunks > 1 else None)
    assert (folder / "latest_checkpointed_iteration.txt").read_text().strip() == "1"
    assert (folder / "hf" / "tokenizer.json").is_file()


def test_packing_of_query_key_value_in_numbers(tmp_path: Path) -> None:
    """Two groups of two heads of one row: q0 q1 k0 v0 | q2 q3 k1 v1, and per rank gate rows before up rows."""
    make_hf(tmp_path / "hf", torch.float32, layers=1, heads=4, groups=2, hidden=4, ffn=4, vocab=8)
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "hf" / "model.safetensors")
    name = "model.layers.0."
    for letter, rows in (("q", [0, 1, 2, 3]), ("k", [10, 11]), ("v", [20, 21])):
        state[f"{name}self_attn.{letter}_proj.bias"] = torch.tensor(rows, dtype=torch.float32)
        state[f"{name}self_attn.{letter}_proj.weight"] = torch.tensor(rows, dtype=torch.float32)[:, None].repeat(1, 4)
    for kind, rows in (("gate", [0, 1, 2, 3]), ("up", [10, 11, 12, 13])):
        state[f"{name}mlp.{kind}_proj.weight"] = torch.tensor(rows, dtype=torch.float32)[:, None].repeat(1, 4)
    state[f"{name}mlp.down_proj.weight"] = torch.arange(4.0).repeat(4, 1)
    save_file(state, tmp_path / "hf" / "model.safetensors")
    to_megatron(tmp_path / "hf", tmp_path / "mg", Layout(2), 1)
    expected = {0: ([0, 1, 10, 20], [0, 1, 10, 11], [0, 1]), 1: ([2, 3, 11, 21], [2, 3, 12, 13], [2, 3])}
    for rank, (qkv, fc1, fc2) in expected.items():
        path = tmp_path / "mg" / "iter_0000001" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        model = torch.load(path, weights_only=False)["model"]
        prefix = "decoder.layers.0."
        assert model[f"{prefix}self_attention.linear_qkv.bias"].tolist() == qkv
        assert model[f"{prefix}self_attention.linear_qkv.weight"][:, 0].tolist() == qkv
        assert model[f"{prefix}mlp.linear_fc1.weight"][:, 0].tolist() == fc1
        assert model[f"{prefix}mlp.linear_fc2.weight"][0].tolist() == fc2


def test_layers_of_virtual_stages_are_dealt_round_by_round() -> None:
    layout = Layout(1, 2, 3)
    assert [[list(layout.layer_indices(12, stage, chunk)) for chunk in range(3)] for stage in range(2)] == [
        [[0, 1], [4, 5], [8, 9]],
        [[2, 3], [6, 7], [10, 11]],
    ]
    assert [(stage, chunk) for stage in range(2) for chunk in range(3) if layout.is_first(stage, chunk)] == [(0, 0)]
    assert [(stage, chunk) for stage in range(2) for chunk in range(3) if layout.is_last(stage, chunk)] == [(1, 2)]


def test_layout_check_names_every_problem() -> None:
    model = ModelConfig(
        num_layers=6, hidden_size=24, ffn_hidden_size=42, num_attention_heads=6, num_query_groups=2, vocab_size=10
    )
    assert Layout(2, 3, 2).check(model) == []
    problems = Layout(4, 4).check(model)
    assert [problem.split(" is ")[0] for problem in problems] == [
        "num_attention_heads 6",
        "num_query_groups 2",
        "ffn_hidden_size 42",
        "num_layers 6",
    ]
    assert problems[0].endswith("choose one of 1, 2.")
    assert problems[3].endswith("one of 1, 2, 3, 6.")
    assert "virtual" in Layout(1, 1, 2).check(model)[0]


@pytest.mark.parametrize("tie", [False, True])
def test_read_chunk_cuts_any_layout_from_either_kind_of_source(tmp_path: Path, tie: bool) -> None:
    """The way training loads: the same chunk from a HF folder and from a checkpoint of another layout."""
    state = make_hf(tmp_path / "hf", tie=tie)
    to_megatron(tmp_path / "hf", tmp_path / "mg", Layout(1, 4), 4)
    wanted = Layout(2, 2, 2)
    opened = open_megatron(tmp_path / "mg")
    assert (opened.layout, opened.iteration, opened.padded_vocab_size, opened.has_optimizer) == (
        Layout(1, 4),
        1,
        101,
        False,
    )
    assert opened.dtype is torch.bfloat16
    assert opened.read_common()["iteration"] == 1
    assert not any(key.startswith("model") for key in opened.read_common())
    hf = open_hf(tmp_path / "hf")
    assert opened.model == hf.model
    for tensor_rank in range(2):
        for stage in range(2):
            for chunk in range(2):
                last = (stage, chunk) == (1, 1)
                head = "model.embed_tokens.weight" if tie else "lm_head.weight"
                expected = packed_by_hand(
                    state,
                    [chunk * 2 + stage],
                    2,
                    tensor_rank,
                    first=stage + chunk == 0,
                    last=last,
                    padded=104,
                    groups=2,
                    head=head,
                )
                for source in (opened, hf):
                    assert_same(
                        expected,
                        read_chunk(source, wanted, tensor_rank, stage, chunk, model=hf.model, padded_vocab_size=104),
                    )


def test_reading_one_chunk_opens_only_the_rank_files_it_needs(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf")
    to_megatron(tmp_path / "hf", tmp_path / "mg", Layout(2, 2), 4)
    opened = open_megatron(tmp_path / "mg")
    for other in ((0, 0), (1, 0)):
        opened.rank_path(*other).unlink()  # the first is already mapped, the second is not needed
    chunk = read_chunk(opened, Layout(2, 2), 1, 1, 0, model=opened.model, padded_vocab_size=102)
    assert "output_layer.weight" in chunk


def test_training_state_in_a_checkpoint_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from modellink.checkpoint.megatron import save_rank_file, write_tracker

    state = make_hf(tmp_path / "hf")
    to_megatron(tmp_path / "hf", tmp_path / "mg", Layout(), 4)
    old = tmp_path / "mg" / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    saved = torch.load(old, weights_only=False)
    saved["args"].consumed_train_samples = 640
    saved.update(
        iteration=20,
        optimizer={"state": {0: torch.ones(3)}},
        opt_param_scheduler={"lr": 1.0},
        rng_state=[{"torch": torch.get_rng_state()}],
    )
    save_rank_file(tmp_path / "mg" / "iter_0000020" / "mp_rank_00" / "model_optim_rng.pt", saved)
    write_tracker(tmp_path / "mg", 20)
    opened = open_megatron(tmp_path / "mg")
    assert opened.iteration == 20 and opened.has_optimizer
    assert set(opened.read_common()) == {
        "args",
        "checkpoint_version",
        "iteration",
        "rng_state",
        "num_floating_point_operations_so_far",
    }
    to_megatron(tmp_path / "mg", tmp_path / "out", Layout(2, 2), 4, loader="megatron")
    assert "optimizer state is left out" in capsys.readouterr().out
    out = open_megatron(tmp_path / "out")
    assert out.folder.name == "iter_0000020" and not out.has_optimizer
    assert out.args["consumed_train_samples"] == 640
    assert (out.args["tensor_model_parallel_size"], out.args["pipeline_model_parallel_size"]) == (2, 2)
    convert("--from", "megatron", "--to", "hf", "--load-dir", tmp_path / "out", "--save-dir", tmp_path / "back")
    assert_same(state, load_hf(tmp_path / "back"))


def test_conversion_needs_no_megatron_no_process_group_no_transformers() -> None:
    program = (
        "import sys, torch; import modellink.checkpoint.convert; "
        "print([name for name in ('megatron', 'transformers', 'torch_npu') if name in sys.modules], "
        "torch.distributed.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"
