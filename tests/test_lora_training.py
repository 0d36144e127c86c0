"""LoRA training: equal to PEFT and to a plain module with shared A, in every layout; continued bit for bit."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ladder import REPO, read_metrics, run_cases
from safetensors.torch import save_file
from test_training_resume import assert_same
from tiny import save_tiny

from modellink.checkpoint.adapters import AdapterCheckpoint
from modellink.checkpoint.rank_file import load_rank_file
from modellink.data.datasets import build_datasets
from modellink.data.indexed import IndexedWriter
from modellink.lora.peft import peft_config

SEQ, GBS, MBS = 32, 4, 2
VOCAB = 1003
LR, WD, CLIP = 2e-3, 0.1, 0.5
EPS = 1e-5  # a gradient of 1e-8 is rounding, and with Adam's 1e-8 a whole step
MODELS = {
    "untied": {"num_key_value_heads": 6, "tie_word_embeddings": False},
    "tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
}
FUSED = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
# adapters: (base model, steps, flags)
KINDS: dict[str, tuple[str, int, list[str]]] = {
    "hf": ("tied", 20, ["--lora-target-modules", "all-linear"]),
    "fused": ("tied", 20, ["--lora-target-modules", *FUSED]),
    "some": ("untied", 8, ["--lora-target-modules", "q_proj", "v_proj", "up_proj", "--use-rslora"]),
    "dora": ("tied", 8, ["--lora-target-modules", "all-linear", "--use-dora"]),
    "fused-dora": ("untied", 8, ["--lora-target-modules", "linear_qkv", "linear_fc2", "--use-dora"]),
    "whole": ("untied", 8, ["--lora-target-modules", "k_proj", "o_proj", "gate_proj", "--lora-modules-to-save",
                            "word_embeddings", "output_layer"]),
    "hf-dropout": ("tied", 8, ["--lora-target-modules", "all-linear", "--lora-dropout", "0.2"]),
    "whole-tied": ("tied", 8, ["--lora-target-modules", "linear_proj", "--lora-modules-to-save", "output_layer"]),
}
TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
VPP = ["--num-layers-per-virtual-pipeline-stage", "1"]
SP, ZERO = ["--sequence-parallel"], ["--use-distributed-optimizer"]
OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather"]
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
LAYOUTS: dict[int, dict[str, list[str]]] = {
    1: {"one": [], "one-full": FULL},
    2: {"tp2": TP2, "tp2-sp": TP2 + SP, "pp2": PP2, "pp2-vpp2": PP2 + VPP, "dp2": [], "dp2-zero": ZERO + OVERLAP,
        "tp2-sp-full": TP2 + SP + FULL, "pp2-full": PP2 + FULL},
    4: {"tp2-pp2-sp": TP2 + PP2 + SP, "tp2-pp2-vpp2-sp-full": TP2 + PP2 + VPP + SP + FULL},
}
# the other kinds run where they could go wrong
RUNS = {"hf": ["one", "one-full", "tp2", "tp2-sp", "pp2", "pp2-vpp2", "dp2", "dp2-zero", "pp2-full", "tp2-pp2-sp"],
        "fused": ["one", "tp2", "tp2-sp", "pp2", "pp2-vpp2", "dp2", "tp2-sp-full", "tp2-pp2-sp"],
        "hf-dropout": ["one", "one-full"], "some": ["one"], "dora": ["one", "tp2", "tp2-pp2-vpp2-sp-full"],
        "fused-dora": ["one", "tp2-sp"], "whole": ["one", "tp2-sp", "pp2"],
        "whole-tied": ["one", "pp2-vpp2", "dp2-zero"]}
CASES = [(world, layout, kind) for world, layouts in LAYOUTS.items() for kind, wanted in RUNS.items()
         for layout in layouts if layout in wanted]
FRESH: dict[int, dict[str, list[str]]] = {
    1: {"one": [], "other": ["--seed", "99"]}, 2: {"tp2": TP2 + SP, "pp2": PP2 + VPP}}
DROPOUT = ["--lora-dropout", "0.1"]
RESUMED: dict[str, tuple[int, str, list[str]]] = {
    "one-bf16-dropout": (1, "hf", ["--bf16", *DROPOUT]),
    "tp2-sp-dora-dropout": (2, "dora", ["--bf16", *TP2, *SP, *DROPOUT]),
    "tp2-dropout-full": (2, "fused", [*TP2, *DROPOUT, *FULL]),
    "pp2-vpp2-whole-tied": (2, "whole-tied", [*PP2, *VPP]),
    "dp2-zero-whole-bf16": (2, "whole", ["--bf16", *ZERO, *OVERLAP]),
    "tp2-pp2-sp": (4, "fused", [*TP2, *PP2, *SP]),
}


def arguments(folder: Path, kind: str, label: str, *more: str) -> list[str]:
    model, steps, flags = KINDS[kind]
    return ["--load", str(folder / f"{model}-mg"), "--data-path", str(folder / "data"), "--split", "100,0,0",
            "--seq-length", str(SEQ), "--train-iters", str(steps), "--micro-batch-size", str(MBS),
            "--global-batch-size", str(GBS), "--lr", str(LR), "--lr-decay-style", "constant", "--weight-decay", str(WD),
            "--clip-grad", str(CLIP), "--adam-beta2", "0.95", "--adam-eps", str(EPS), "--eval-iters", "0",
            "--device", "cpu", "--lora-r", "4", "--lora-alpha", "10",
            "--metrics-file", str(folder / f"{kind}.{label}.jsonl"), *flags, *more]


def start_folder(folder: Path, kind: str) -> Path:
    return folder / f"{kind.removesuffix('-dropout')}-start"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases through the real converter, a data set, and for each kind adapters that are not zero."""
    from modellink.checkpoint.convert import main as convert

    base = tmp_path_factory.mktemp("lora")
    for name, changes in MODELS.items():
        save_tiny(base / name, **changes)
        assert convert(["--from", "hf", "--to", "megatron", "--load-dir", str(base / name),
                        "--save-dir", str(base / f"{name}-mg")]) == 0
    generator = np.random.default_rng(7)
    with IndexedWriter(base / "data") as writer:
        lengths = generator.integers(5, 90, 60)
        writer.append(generator.integers(0, VOCAB, lengths.sum()), lengths)
    start = ["--train-iters", "3", "--lr", "2e-2"]
    run_cases([arguments(base, kind, "start", *start, "--save", str(start_folder(base, kind)))
               for kind in KINDS if "dropout" not in kind], 1, base)
    return base


def fresh_arguments(folder: Path, name: str, flags: list[str]) -> list[str]:
    return arguments(folder, "hf", f"fresh-{name}", "--train-iters", "1", "--lr", "1e-30", "--save",
                     str(folder / f"fresh-{name}"), *flags)


def resumed_arguments(folder: Path, name: str, part: str, save: str, *more: str) -> list[str]:
    _, kind, flags = RESUMED[name]
    return arguments(folder, kind, f"{name}.{part}", *flags, "--train-iters", "4", "--save",
                     str(folder / "runs" / name / save), *more)


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[tuple[str, str], list[dict]]:
    """Every run of this file that needs no earlier one; metrics of every (kind, layout), from the same adapters."""
    for world, layouts in LAYOUTS.items():
        cases = [arguments(folder, kind, layout, "--lora-load", str(start_folder(folder, kind)), *layouts[layout])
                 for size, layout, kind in CASES if size == world]
        cases += [fresh_arguments(folder, name, flags) for name, flags in FRESH.get(world, {}).items()]
        for name in (name for name, (size, _, _) in RESUMED.items() if size == world):
            cases.append(resumed_arguments(folder, name, "whole", "whole"))
            cases.append(resumed_arguments(folder, name, "first", "halves", "--exit-interval", "2"))
        run_cases(cases, world, folder)
    return {(kind, layout): read_metrics(folder / f"{kind}.{layout}.jsonl") for _, layout, kind in CASES}


def train_plainly(folder: Path, model: torch.nn.Module, steps: int) -> tuple[list[float], list[float]]:
    """A plain loop over the trainable parameters of a model with transformers' interface."""
    data, _, _ = build_datasets(
        data_path=[str(folder / "data")], split="100,0,0", train_data_path=None, valid_data_path=None,
        test_data_path=None, mock=False, vocab_size=VOCAB, num_samples=(steps * GBS, 0, 0), seq_length=SEQ, seed=1234,
        cache_dir=None, build=True)
    assert data is not None
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": WD},
         {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}], lr=LR, betas=(0.9, 0.95), eps=EPS)
    losses, norms = [], []
    for step in range(steps):
        samples = [data[i] for i in range(step * GBS, (step + 1) * GBS)]
        tokens = torch.stack([torch.as_tensor(sample["tokens"]) for sample in samples])
        labels = torch.stack([torch.as_tensor(sample["labels"]) for sample in samples])
        loss = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, CLIP)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def hf_model(folder: Path, kind: str) -> Any:
    from transformers import Qwen2ForCausalLM

    return Qwen2ForCausalLM.from_pretrained(folder / KINDS[kind][0], dtype=torch.float32)


def peft_model(folder: Path, kind: str) -> Any:
    """PEFT's model with the start adapters, through our export names."""
    from peft import PeftModel

    adapters = AdapterCheckpoint(folder / f"{kind}-start")
    target = folder / f"{kind}-peft"
    target.mkdir(exist_ok=True)
    save_file(dict(adapters.tensors()), target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_text(json.dumps(peft_config(adapters.config.plan, None,
                                                                              adapters.model.tie_word_embeddings)))
    return PeftModel.from_pretrained(hf_model(folder, kind), target, is_trainable=True).train()


def assert_same_run(records: list[dict], losses: list[float], norms: list[float]) -> None:
    assert [record["loss"] for record in records] == pytest.approx(losses, abs=1e-5)
    assert [record["grad_norm"] for record in records] == pytest.approx(norms, rel=2e-5)
    assert len(set(losses)) == len(losses) and min(norms) > 0.05


@pytest.mark.parametrize("kind", ["hf", "some", "dora", "whole"])
def test_hf_names_equal_peft(kind: str, folder: Path, results: dict) -> None:
    assert_same_run(results[kind, "one"], *train_plainly(folder, peft_model(folder, kind), KINDS[kind][1]))


class SharedAdapters(torch.nn.Module):
    """A linear layer of transformers with an adapter whose A it shares with its neighbours."""

    def __init__(self, base: torch.nn.Linear, a: torch.nn.Parameter, b: torch.Tensor, scale: float):
        super().__init__()
        self.base, self.a, self.b, self.scale = base, a, torch.nn.Parameter(b.clone()), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * (x @ self.a.T @ self.b.T)


def shared_model(folder: Path, kind: str) -> torch.nn.Module:
    adapters = AdapterCheckpoint(folder / f"{kind}-start")
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in adapters.tensors()}
    model = hf_model(folder, kind).requires_grad_(False)
    for index, layer in enumerate(model.model.layers):
        for owner, names in ((layer.self_attn, "qkv"), (layer.self_attn, "o"), (layer.mlp, ("gate", "up")),
                             (layer.mlp, ("down",))):
            place = f"model.layers.{index}.{'self_attn' if owner is layer.self_attn else 'mlp'}."
            a = torch.nn.Parameter(tensors[f"{place}{names[0]}_proj.lora_A.weight"].clone())
            for name in names:
                setattr(owner, f"{name}_proj", SharedAdapters(
                    getattr(owner, f"{name}_proj"), a, tensors[f"{place}{name}_proj.lora_B.weight"],
                    adapters.config.plan.scaling))
    return model.train()


def test_fused_names_equal_a_plain_module(folder: Path, results: dict) -> None:
    model = shared_model(folder, "fused")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert_same_run(results["fused", "one"], *train_plainly(folder, model, KINDS["fused"][1]))
    # one A for each of four linear layers, not for each of seven projections
    assert trained == 4 * 4 * ((96 + 96 + 2 * 32) + (96 + 96) + (96 + 320) + (160 + 96))


@pytest.mark.parametrize(("world", "layout", "kind"), [case for case in CASES if case[1] != "one"])
def test_layout_equals_one_process(world: int, layout: str, kind: str, results: dict) -> None:
    reference, records = results[kind, "one"], results[kind, layout]
    assert len(records) == KINDS[kind][1]
    assert [record["loss"] for record in records] == pytest.approx([r["loss"] for r in reference], abs=1e-5)
    assert [record["grad_norm"] for record in records] == pytest.approx([r["grad_norm"] for r in reference], rel=2e-5)


def test_dropout_is_drawn_in_training(results: dict) -> None:
    plain, dropped = results["hf", "one"], results["hf-dropout", "one"]  # from the same adapters
    assert 1e-4 < abs(plain[0]["loss"] - dropped[0]["loss"]) < 0.1


def test_start_values_depend_on_the_seed_and_not_on_the_layout(folder: Path, results: dict) -> None:
    found = {name: dict(AdapterCheckpoint(folder / f"fresh-{name}").tensors())
             for names in FRESH.values() for name in names}
    inputs = {name: tensor for name, tensor in found["one"].items() if "lora_A" in name}
    for name, tensor in inputs.items():
        assert torch.equal(tensor, found["tp2"][name]) and torch.equal(tensor, found["pp2"][name]), name
        assert not torch.equal(tensor, found["other"][name])
        bound = 1 / math.sqrt(tensor.shape[1])
        assert 0.9 * bound < tensor.abs().max() <= bound
    assert len({tuple(tensor.flatten()[:3].tolist()) for tensor in inputs.values()}) == len(inputs) == 28
    assert all(tensor.abs().max() < 1e-20 for name, tensor in found["one"].items() if "lora_B" in name)


@pytest.fixture(scope="module")
def resumed(folder: Path, results: dict) -> Path:
    """The runs that were stopped after 2 of 4 steps, by the same command lines again in new processes."""
    for world in LAYOUTS:
        run_cases([resumed_arguments(folder, name, "second", "halves")
                   for name, (size, _, _) in RESUMED.items() if size == world], world, folder)
    return folder


@pytest.mark.parametrize("name", RESUMED)
def test_two_and_two_steps_equal_four(name: str, resumed: Path) -> None:
    kind = RESUMED[name][1]
    whole = read_metrics(resumed / f"{kind}.{name}.whole.jsonl")
    parts = [*read_metrics(resumed / f"{kind}.{name}.first.jsonl"),
             *read_metrics(resumed / f"{kind}.{name}.second.jsonl")]
    assert [record["step"] for record in parts] == [1, 2, 3, 4]
    for key in ("loss", "grad_norm", "lr", "samples"):
        assert [record[key] for record in parts] == [record[key] for record in whole], key
    place = resumed / "runs" / name
    files = sorted(path.relative_to(place / "whole") for path in (place / "whole" / "iter_0000004").rglob("*.pt"))
    assert files
    for file in files:
        assert_same(load_rank_file(place / "whole" / file), load_rank_file(place / "halves" / file), str(file))


@pytest.mark.parametrize("name", ["tp2-sp-dora-dropout", "tp2-dropout-full"])
def test_replicas_stay_equal(name: str, resumed: Path) -> None:
    first, second = (load_rank_file(resumed / "runs" / name / "whole" / "iter_0000004" / rank / "model_optim_rng.pt")
                     ["model"] for rank in ("mp_rank_00", "mp_rank_01"))
    column = ("linear_qkv.", "linear_fc1.")
    replicas = [key for key in first if ("lora_A" in key) == any(linear in key for linear in column)]
    assert len(replicas) >= len(first) // 2 - 8
    for key in first:
        assert torch.equal(first[key], second[key]) == (key in replicas), key


def test_checkpoints_hold_adapters_and_nothing_else(resumed: Path) -> None:
    place = resumed / "runs" / "tp2-pp2-sp" / "whole"
    names = set()
    for path in (place / "iter_0000004").rglob("model_optim_rng.pt"):
        names |= set(load_rank_file(path)["model"])
    assert len(names) == 2 * 4 * 2  # layers of a stage, linear layers, A and B
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    config = json.loads((place / "adapter_config.json").read_text())
    assert config["rank"] == 4 and config["alpha"] == 10 and config["kind"] == "fused" and config["scaling"] == 2.5
    assert config["base"]["shape"]["num_query_groups"] == 2 and len(config["base"]["checksum"]) == 64
    state = load_rank_file(resumed / "runs" / "tp2-sp-dora-dropout" / "whole" / "iter_0000004" / "mp_rank_00"
                           / "model_optim_rng.pt")
    assert {name.split(".")[-2] for name in state["model"]} == {"lora_A", "lora_B", "lora_magnitude"}
    assert {tensor.dtype for tensor in state["model"].values()} == {torch.bfloat16}


PROBE = """
import json, sys, torch
from modellink.config.settings import parse_settings
from modellink.runtime import prepare_run
from modellink.start import start
run = prepare_run(parse_settings("probe", "", sys.argv[1:]), 1, "train")
device = start(run)
from modellink.training.loop import Trainer, build_state, load_data
from modellink.training.adapters import start_adapters
state = build_state(run, device)
start_adapters(state)
base = {name: value.clone() for name, value in state.chunks[0].module.named_parameters() if not value.requires_grad}
Trainer(state).step(Trainer(state).reader(load_data(run)[0]), [])
parameters = dict(state.chunks[0].module.named_parameters())
held = [value for values in state.optimizer.optimizer.state.values() for value in values.values()]
print(json.dumps({
    "buffer": sum(buffer.numel for buffer in state.chunks[0].buffers),
    "trained": sum(value.numel() for value in parameters.values() if value.requires_grad),
    "frozen": sum(value.numel() for value in parameters.values() if not value.requires_grad),
    "state": sum(value.numel() for value in held if torch.is_tensor(value) and value.dim()),
    "gradients": [name for name in base if parameters[name].grad is not None or hasattr(parameters[name], "main_grad")],
    "changed": [name for name in base if not torch.equal(base[name], parameters[name])],
}))
"""


def test_frozen_weights_have_no_gradient_buffer_or_state(folder: Path) -> None:
    words = arguments(folder, "hf", "probe", "--lora-load", str(folder / "hf-start"))
    done = subprocess.run([sys.executable, "-c", PROBE, *words], cwd=REPO, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["trained"] == found["buffer"] == 4 * 4 * (4 * 96 + 2 * 96 + 2 * 32 + 3 * (96 + 160))
    assert found["state"] == 2 * found["trained"] and found["frozen"] == 4 * (96 * (2 * 96 + 2 * 32 + 3 * 160 + 2)
                                                                             + 96 + 2 * 32) + VOCAB * 96 + 96
    assert found["gradients"] == [] and found["changed"] == []
