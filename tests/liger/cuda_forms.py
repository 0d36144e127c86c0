"""Trains a tiny model in the forms of the CPU and in those that a GPU would get: `python cuda_forms.py FOLDER`.

The choice of forms is told of a GPU; the tensors stay on the CPU and Triton kernels are interpreted. In fp32 and bf16.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cuda_contracts import addmm_on_cpu  # noqa: E402
from interpreted import complete_interpreter  # noqa: E402
from ladder import main, read_metrics  # noqa: E402

from modellink.models import forms  # noqa: E402
from modellink.ops.forms import Situation  # noqa: E402
from modellink.ops.table import choose  # noqa: E402

real_situation = forms.situation_of


def situation_on_cuda(run: Any, device: Any) -> Situation:
    return dataclasses.replace(real_situation(run, device), device="cuda")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found: dict[str, Any] = {}
    words = ["--load", str(folder / "weights"), "--finetune", "--mock-data", "--seq-length", "16", "--device", "cpu",
             "--micro-batch-size", "2", "--global-batch-size", "2", "--lr", "1e-3", "--eval-iters", "0",
             "--train-iters", "3"]
    complete_interpreter()
    cases = [(f"{name}{kind}", situation, flags) for kind, flags in (("", []), ("-bf16", ["--bf16"]))
             for name, situation in (("cpu", real_situation), ("cuda", situation_on_cuda))]
    for name, situation, flags in cases:
        (folder / f"{name}.json").write_text(json.dumps(
            [[*words, *flags, "--metrics-file", str(folder / f"{name}.jsonl")]]))

        def told(run: Any, device: Any, name: str = name, situation: Any = situation) -> Situation:
            result = situation(run, device)
            found[f"{name}_forms"] = {choice.operation: choice.form.name for choice in choose(result)}
            return result

        with patch.object(forms, "situation_of", told), addmm_on_cpu() as called:
            main(str(folder / f"{name}.json"))
        found[f"{name}_sums"] = len(called)
        records = read_metrics(folder / f"{name}.jsonl")
        found[name] = [record["loss"] for record in records]
        found[f"{name}_norms"] = [record["grad_norm"] for record in records]
    (folder / "losses.json").write_text(json.dumps(found))
