"""megatron-core's own model takes every tensor of a converted checkpoint by name and shape, and lacks none."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from checkpoint_folders import make_hf

from modellink.checkpoint.hf import open_hf
from modellink.checkpoint.layout import Layout
from modellink.checkpoint.megatron import read_chunk

# a process of its own: megatron-core keeps its groups in module globals
PROGRAM = """
import json, sys
import torch, torch.distributed as dist
store = dist.FileStore(sys.argv[1] + "/store", 1)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
from megatron.core import parallel_state
parallel_state.initialize_model_parallel()
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
config = TransformerConfig(num_layers=2, hidden_size=24, ffn_hidden_size=40, num_attention_heads=6, num_query_groups=2,
                           use_cpu_initialization=True, add_bias_linear=False, add_qkv_bias=True,
                           gated_linear_unit=True, normalization="RMSNorm", masked_softmax_fusion=False)
report = []
for case in json.loads(sys.argv[2]):
    model = GPTModel(config, get_gpt_layer_local_spec(normalization="RMSNorm"), vocab_size=101, max_sequence_length=32,
                     pre_process=case["first"], post_process=case["last"],
                     share_embeddings_and_output_weights=case["tie"], position_embedding_type="rope")
    own = [name for name in model.state_dict() if not name.endswith("_extra_state")]
    loaded = torch.load(case["path"])
    model.load_state_dict(loaded, strict=True)
    report.append([own == list(loaded), all(torch.equal(model.state_dict()[name], loaded[name]) for name in own)])
print("REPORT", json.dumps(report))
"""


def test_megatron_core_loads_every_chunk(tmp_path: Path) -> None:
    cases = []
    for tie in (False, True):
        make_hf(tmp_path / f"hf{tie}", torch.float32, layers=4, tie=tie)
        source = open_hf(tmp_path / f"hf{tie}")
        for layout, stages in ((Layout(1, 2), (0, 1)),):
            for stage in stages:
                path = tmp_path / f"chunk{tie}{stage}.pt"
                torch.save(read_chunk(source, layout, 0, stage, 0, model=source.model, padded_vocab_size=101), path)
                cases.append({"tie": tie, "first": stage == 0, "last": stage == 1, "path": str(path)})
        make_hf(tmp_path / f"short{tie}", torch.float32, layers=2, tie=tie)
        source = open_hf(tmp_path / f"short{tie}")
        path = tmp_path / f"whole{tie}.pt"
        torch.save(read_chunk(source, Layout(), 0, 0, 0, model=source.model, padded_vocab_size=101), path)
        cases.append({"tie": tie, "first": True, "last": True, "path": str(path)})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path), json.dumps(cases)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.split("REPORT", 1)[1])
    assert report == [[True, True]] * 6
