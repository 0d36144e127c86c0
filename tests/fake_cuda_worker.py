"""Training and generation on fake cuda tensors: `python fake_cuda_worker.py LIBRARY FOLDER` writes FOLDER/found.json.

Models have the sizes of the real ones, most of them two layers. See `fake_cuda.py`.
"""

import sys

import fake_cuda

fake_cuda.load(sys.argv[1])

import dataclasses  # noqa: E402
import json  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from host_looks import HostLooks  # noqa: E402
from torch import Tensor  # noqa: E402

from modellink.config.settings import parse_settings  # noqa: E402
from modellink.models.presets.qwen15 import PRESETS  # noqa: E402
from modellink.models.run import Run  # noqa: E402
from modellink.parallel.groups import seed_everything, start_groups  # noqa: E402
from modellink.runtime import prepare_run  # noqa: E402
from modellink.start import prepare_core  # noqa: E402

RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
LORA = "--lora-r 8 --lora-alpha 16 --lora-target-modules all-linear"
# name -> (preset, layers or 0 for all of them, further flags)
TRAINING = {
    "0.5b": ("0.5b", 0, "--mock-data --seq-length 4096 --global-batch-size 1"),
    "7b": ("7b", 2, f"--mock-data --seq-length 8192 --global-batch-size 2 {RECOMPUTE}"),
    "7b lora": ("7b", 2, f"--mock-data --seq-length 4096 --global-batch-size 1 {LORA}"),
    "110b packed": ("110b", 2, "--is-instruction-dataset --pack --seq-length 64 --global-batch-size 4 "
                               "--micro-batch-size 2 --gradient-accumulation-fusion"),
}
GENERATION = {"7b": ("7b", "auto"), "110b": ("110b", "auto"), "7b int8": ("7b", "int8")}
NEW_TOKENS = 12


def run_of(folder: Path, preset: str, layers: int, flags: str) -> Run:
    """For a machine that has a GPU: this one's driver is not asked."""
    config = PRESETS[f"qwen15-{preset}"].to_hf()
    model = folder / f"{preset}-{layers}"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(config | ({"num_hidden_layers": layers} if layers else {})))
    line = f"--model {model} --bf16 --device cuda --train-iters 1 --lr 1e-4 --eval-iters 0 --split 100,0,0 {flags}"
    return prepare_run(parse_settings("fake", "", line.split()), 1, "train", elsewhere=True)


def kinds(tensors: Any) -> list[list[str]]:
    """Devices and dtypes that occur."""
    return sorted({(str(tensor.device), str(tensor.dtype)) for tensor in tensors})


def train(run: Run, device: Any, looks: HostLooks) -> dict[str, Any]:
    """A step of the training loop."""
    from modellink.training.loop import Trainer, build_state, load_data

    state = build_state(run, device)
    trainer = Trainer(state)
    reader = trainer.reader(load_data(run)[0])
    looks.clear()
    result, values = trainer.step(reader, [0, 0])
    parameters = [parameter for chunk in state.chunks for parameter in chunk.module.parameters()]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    parts = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
    return {"seen": looks.report(), "operators": sorted(looks.operators), "loss": result.loss,
            "skipped": values["skipped"], "parameters": sum(parameter.numel() for parameter in parameters),
            "weights": kinds(parameters), "main_grads": kinds(parameter.main_grad for parameter in trained),
            "moments": kinds(moment for part in parts for moments in part.optimizer.state.values()
                             for moment in moments.values())}


def generate(run: Run, device: Any, looks: HostLooks, kind: str) -> dict[str, Any]:
    """Rows of other lengths, a sampled answer, beams and scores; then greedy steps again, recorded."""
    from modellink.inference import steps
    from modellink.inference.engine import Engine
    from modellink.inference.request import Request, SamplingSettings
    from modellink.models.build import build_chunks, transformer_config
    from modellink.models.forms import choose_forms

    choose_forms(run, device)
    recorded: list[list[tuple[str, str]]] = []  # looks of the host while a step was recorded

    def capture(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        before = len(looks.seen)
        out = step()
        recorded.append(looks.seen[before:])
        return lambda: out

    def engine(**options: Any) -> Any:
        config = transformer_config(run, device.name, perform_initialization=False)
        chunks = [chunk.to(device.current()) for chunk in build_chunks(run, config, device.name)]
        return Engine(chunks, run, device.current(), kv_cache_dtype=kind, max_batch_size=3, prefill_chunk_size=64,
                      **options)

    settings = SamplingSettings(max_new_tokens=NEW_TOKENS)
    greedy = [Request([7] * length, settings) for length in (50, 9, 3)]
    found: dict[str, Any] = {"operators": {}}
    plain = engine()
    for name, ask in {
        "steps": lambda: plain.generate(greedy),
        "prompt in parts": lambda: plain.generate([Request([5] * 150, dataclasses.replace(settings, logprobs=True))]),
        "sampled": lambda: plain.generate([Request([3, 4], dataclasses.replace(
            settings, temperature=0.7, greedy=False, top_k=20, top_p=0.9, repetition_penalty=1.1))]),
        "beams": lambda: plain.generate([Request([3, 4], dataclasses.replace(settings, num_beams=3))]),
        "scores": lambda: plain.score([([1, 2, 3], [4, 5]), ([1, 2, 3], [6]), ([9], [8, 7, 6])]),
    }.items():
        looks.clear()
        ask()
        found[name] = looks.report()
        found["operators"][name] = sorted(looks.operators)
    steps.READ_TOGETHER, steps.WORTH_RECORDING = 32, 4
    fast = engine(recorder=lambda: capture)
    looks.clear()
    fast.generate(greedy)
    found["operators"]["recorded"] = sorted(looks.operators)
    return found | {"recorded": looks.report(), "recordings": recorded}


def main(folder: Path) -> None:
    found: dict[str, Any] = {"training": {}, "generation": {}}
    with fake_cuda.absent_gpu() as device, HostLooks() as looks:
        prepare_core(device)
        for name, (preset, layers, flags) in TRAINING.items():
            data = f" --data-path {folder / 'data'}" if "--pack" in flags else ""
            run = run_of(folder, preset, layers, flags + data)
            start_groups(device, run.dims, 10)
            seed_everything(1)
            found["training"][name] = train(run, device, looks)
        for name, (preset, kind) in GENERATION.items():
            run = run_of(folder, preset, 2, "--mock-data --seq-length 4096 --global-batch-size 1")
            found["generation"][name] = generate(run, device, looks, kind)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[2]))
