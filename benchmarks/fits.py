"""Memory of both sides of train_step.py in bf16 on one GPU, counted and never measured there."""

import json
import tempfile
from pathlib import Path
from typing import Any

from shapes import TRAINING, shape_of

from modellink.config.settings import parse_settings
from modellink.planner.plan import Plan
from modellink.runtime import prepare_run


def our_bytes(config: dict[str, Any], seq_length: int) -> int:
    """The plan's bytes of a training step of ours, one sample a microbatch."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        run = prepare_run(parse_settings("fits", "", [
            "--model", folder, "--mock-data", "--train-iters", "1", "--lr", "1e-4", "--seq-length", str(seq_length),
            "--micro-batch-size", "1", "--global-batch-size", "2", "--bf16", "--device", "cpu"]), 1, "train")
    return Plan.of(run).stages[0].total


def peer_bytes(config: dict[str, Any], seq_length: int) -> int:
    """Bytes of transformers' step with autocast to bf16 and without liger-kernel, one sample a microbatch, when the
    gradient of the loss is computed in a microbatch after the first.

    - a parameter: fp32 weight, gradient and two moments, 16;
    - a weight of a linear layer: autocast's copy, which the backward needs, 2;
    - a token in a layer, 34 hidden + 8 ffn: the residual and its normalized form in fp32 at both norms (16 hidden); the
      bf16 copies that autocast makes for each of six products (12 hidden) and the down product (2 ffn); rotated query,
      key, value in bf16 (6 hidden); gate, its SiLU and the up product in bf16 (6 ffn). The output of attention is the
      copy for its projection. As many key-value heads as heads;
    - a token: input, normalized form and the head's copy at the last norm, 10 hidden;
    - a logit: log-softmax, its gradient and the logit's gradient in fp32, 12.

    Leaves out the rotary table and the workspaces of libraries.
    """
    hidden, ffn, layers, words = (config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers",
                                                            "vocab_size"))
    linear = layers * (4 * hidden**2 + 3 * hidden * ffn) + words * hidden
    others = layers * 5 * hidden + hidden + (0 if config["tie_word_embeddings"] else words * hidden)
    a_token = layers * (34 * hidden + 8 * ffn) + 10 * hidden + 12 * words
    return 16 * (linear + others) + 2 * linear + a_token * seq_length


def most_layers(shape: str, seq_length: int, limit: float) -> int:
    """The most layers of a shape with which both sides stay within `limit` bytes."""
    configs = [shape_of(shape, TRAINING, layers=layers, positions=seq_length)
               for layers in range(1, shape_of(shape, TRAINING)["num_hidden_layers"] + 1)]
    return max(config["num_hidden_layers"] for config in configs
               if max(our_bytes(config, seq_length), peer_bytes(config, seq_length)) <= limit)
