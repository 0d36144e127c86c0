"""tools/npu_acceptance.py on the simulated NPU: every part runs, every limit holds, and the report is whole."""

from npu_environment import SIMULATE, require_simulation

require_simulation()

import json  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from ladder import REPO  # noqa: E402
from tiny import tiny_config  # noqa: E402


def test_all_parts_pass_on_the_simulated_device(tmp_path: Path) -> None:
    tiny_config(num_hidden_layers=2).save_pretrained(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "tools/npu_acceptance.py", "--runner", str(SIMULATE), "--out", str(tmp_path / "out"),
         "--steps", "2", "--megabytes", "1", "--model", str(tmp_path / "model"), "--seq-length", "64"],
        cwd=REPO, env=dict(os.environ), capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "out" / "acceptance.json").read_text())
    assert report["simulated"] and report["product"] == "Ascend910B1" and report["ranks"] == 2
    rows = report["rows"]
    assert {row["part"] for row in rows} == {"operators", "collectives", "curve", "generation", "speed"}
    judged = [row for row in rows if row["verdict"] != "-"]
    assert {row["verdict"] for row in judged} == {"pass"}, done.stdout
    # operators by dtype; collectives, and four products of MC2; curves; logits by precision, and answers in fp32
    assert [sum(row["part"] == part for row in judged) for part in ("operators", "collectives", "curve", "generation")
            ] == [69, 9, 7, 10]
    assert all(word in done.stdout for word in ("(simulated)", "npu_fusion_attention", "all_reduce", "MC2", "tokens/s"))
    assert "column_linear: MC2" in (tmp_path / "out" / "curve-bf16-tp2-sp-mc2-npu.log").read_text()


def test_kernels_that_refuse_are_failed_rows(tmp_path: Path) -> None:
    """Here there is no runner: the stub libraries refuse every kernel, and each case says so for itself."""
    done = subprocess.run([sys.executable, "tools/npu_acceptance.py", "--out", str(tmp_path), "--part", "operators"],
                          cwd=REPO, env=dict(os.environ), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / "acceptance.json").read_text())["rows"]
    assert len(rows) == 69 and {row["verdict"] for row in rows} == {"FAILED"}
    assert {row["failure"]["exception"] for row in rows} == {"RuntimeError"}
    said = {row["failure"]["message"].split()[0] for row in rows}
    assert {"aclnnFlashAttentionScore", "aclnnFusedInferAttentionScoreV2", "aclnnSwiGlu"} <= said
