"""lm-eval's command line on our engine, against its own model of transformers: same requests, scores and texts."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from data_helpers import make_tokenizer, paragraphs
from tiny import save_tiny

from modellink.config.errors import ConfigError
from modellink.evaluation.command import split_backend
from modellink.launch.ranks import free_port

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'modellink[eval]')")
REPO = Path(__file__).parents[1]
LAYOUTS = ("one", "tp2", "pp2", "dp2")
TASKS: dict[str, str] = {
    "own_choice": """
        fewshot_split: dev
        num_fewshot: 2
        output_type: multiple_choice
        doc_to_text: "Question: {{question}}\\nAnswer:"
        doc_to_choice: "{{choices}}"
        doc_to_target: answer
        metric_list: [{metric: acc}, {metric: acc_norm}]
        """,
    "own_text": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{question}}"
        metric_list: [{metric: byte_perplexity}]
        """,
    "own_write": """
        fewshot_split: dev
        num_fewshot: 1
        output_type: generate_until
        doc_to_text: "Question: {{question}}\\nAnswer:"
        doc_to_target: "{{choices[answer]}}"
        generation_kwargs: {until: ["\\n", "th", "e "], max_gen_toks: 20}
        metric_list: [{metric: exact_match}]
        """,
    "own_draw": """
        output_type: generate_until
        doc_to_text: "Question: {{question}}\\nAnswer:"
        doc_to_target: "{{choices[answer]}}"
        repeats: 2
        generation_kwargs: {until: [], max_gen_toks: 8, do_sample: true, temperature: 1.0}
        metric_list: [{metric: exact_match}]
        """,
}
WRONG = [
    (["--tasks", "own_choice", "-M", "hf"], "-M: the model is the one of --load; leave it out."),
    (["--tasks", "own_choice", "--batch_size=4"], "--batch_size: the requests of a step are --max-batch-size; leave it "
                                                   "out."),
    (["--tasks", "own_choice", "--temperature", "2"],
     "--temperature: lm-eval takes this from its tasks; use --tasks and --gen_kwargs."),
    (["--tasks", "own_chioce"],
     "lm-eval: Tasks not found: own_chioce; lm-eval run --help shows its flags, and python -m "
     "modellink.evaluation.lm_eval ls tasks its tasks."),
    (["--tasks", "own_choice", "--num_shots", "3"], "lm-eval: error: unrecognized arguments: --num_shots 3"),
]


def write_tasks(folder: Path) -> None:
    """Task files over local data: short and long questions, one longer than the model's 256 positions."""
    folder.mkdir()
    texts = [" ".join(text.split()) for text in paragraphs(400) if len(text) > 300]
    questions = [{"question": text[:60 + 20 * number], "choices": [" " + text[:20], " yes", " no, never", "x"],
                  "answer": number % 4} for number, text in enumerate(texts[:14])]
    questions.append({"question": " ".join(texts[20:30])[:3000], "choices": [" a", " b", " long one", "d"],
                      "answer": 1})
    shots = [{"question": text[:40], "choices": [" a", " b", " c", " d"], "answer": number % 4}
             for number, text in enumerate(texts[40:50])]
    for name, rows in (("test", questions), ("dev", shots)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, body in TASKS.items():
        lines = [f"task: {name}", "dataset_path: json", "dataset_kwargs:", "  data_files:",
                 f"    test: {folder / 'test.jsonl'}", f"    dev: {folder / 'dev.jsonl'}", "test_split: test"]
        lines += [line.strip() for line in body.strip().splitlines()]
        (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm_eval")
    make_tokenizer(folder / "model")
    save_tiny(folder / "model")
    write_tasks(folder / "tasks")
    lines = [[*line, "--include_path", str(folder / "tasks")] for line, _ in WRONG]
    (folder / "wrong.json").write_text(json.dumps(lines))
    (folder / "ports.json").write_text(json.dumps([free_port() for _ in LAYOUTS]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "HF_DATASETS_OFFLINE": "1",
                   "HF_DATASETS_CACHE": str(folder / "cache")}
    worker = [str(REPO / "tests" / "lm_eval_worker.py"), str(folder)]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for start in ([], two):
        done = subprocess.run([sys.executable, *start, *worker], env=environment, cwd=folder, capture_output=True,
                              text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    """The logged samples of a task, by question."""
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda row: row["doc_id"])


def scores(folder: Path) -> dict[str, dict[str, Any]]:
    (path,) = folder.rglob("results_*.json")
    found: dict[str, dict[str, Any]] = json.loads(path.read_text())["results"]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_requests_are_those_of_lm_evals_own_model(results: Path, layout: str) -> None:
    for task in ("own_choice", "own_text", "own_write"):
        ours, theirs = samples(results / layout, task), samples(results / "hf", task)
        assert [row["arguments"] for row in ours] == [row["arguments"] for row in theirs]
        assert len(ours) == 15


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_likelihoods_are_equal(results: Path, layout: str) -> None:
    """Also where the context is cut from the left to fit the model."""
    for ours, theirs in zip(samples(results / layout, "own_choice"), samples(results / "hf", "own_choice")):
        for (own,), (other,) in zip(ours["resps"], theirs["resps"], strict=True):
            assert float(own[0]) == pytest.approx(float(other[0]), abs=1e-4)
            assert own[1] == other[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rolling_log_likelihoods_are_equal(results: Path, layout: str) -> None:
    ours, theirs = samples(results / layout, "own_text"), samples(results / "hf", "own_text")
    for own, other in zip(ours, theirs):
        assert float(own["resps"][0][0]) == pytest.approx(float(other["resps"][0][0]), rel=1e-6)
    assert min(float(row["resps"][0][0]) for row in theirs) < -4000  # a text of several windows is among them


@pytest.mark.parametrize("layout", LAYOUTS)
def test_generated_texts_are_equal(results: Path, layout: str) -> None:
    ours, theirs = samples(results / layout, "own_write"), samples(results / "hf", "own_write")
    assert [row["resps"] for row in ours] == [row["resps"] for row in theirs]
    lengths = [len(row["resps"][0][0]) for row in theirs]
    assert min(lengths) < 20 < max(lengths)  # some are stopped by a text, some by their length


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_equal(results: Path, layout: str) -> None:
    ours, theirs = scores(results / layout), scores(results / "hf")
    for task in ("own_choice", "own_write", "own_text"):
        for name, value in theirs[task].items():
            if isinstance(value, float):
                assert ours[task][name] == pytest.approx(value, rel=1e-5), (task, name)


def test_drawn_texts_differ_between_repeats_and_not_between_layouts(results: Path) -> None:
    drawn = {layout: [row["resps"] for row in samples(results / layout, "own_draw")] for layout in LAYOUTS}
    assert all(drawn[layout] == drawn["one"] for layout in LAYOUTS)
    assert all(first != second for ((first, second),) in drawn["one"])


def test_the_layout_is_written_beside_the_scores(results: Path) -> None:
    (path,) = (results / "pp2").rglob("results_*.json")
    config = json.loads(path.read_text())["config"]
    assert config["layout"] == {"tensor": 1, "pipeline": 2, "data": 1} and config["model_dtype"] == "fp32"
    assert config["model_args"]["pretrained"] == str(results / "model")


def test_wrong_command_lines_are_one_sentence_and_exit_code_2(results: Path) -> None:
    said = json.loads((results / "said.json").read_text())
    assert said == [[2, [sentence]] for _, sentence in WRONG]


def test_settings_of_a_task_that_the_engine_cannot_meet_are_refused(results: Path) -> None:
    (unknown,), (too_long,) = json.loads((results / "refused.json").read_text())
    assert unknown.startswith("generation_kwargs typical_p: the engine has no such setting; choose from early_sto")
    assert too_long == ("max_gen_toks 256: leaves no room for a prompt in the 256 positions of the model; give less by "
                        "--gen_kwargs max_gen_toks=N, or raise --seq-length.")


def test_the_backend_is_split_off() -> None:
    words = ["--load", "x", "--backend", "lm-eval", "--tasks", "a", "b", "--limit", "0.5", "-x"]
    assert split_backend(words) == ("lm-eval", ["--load", "x", "--tasks", "a", "b", "--limit", "0.5", "-x"])
    assert split_backend(["--task", "mmlu"]) == ("modellink", ["--task", "mmlu"])
    with pytest.raises(ConfigError, match="invalid choice: 'lm_eval'"):
        split_backend(["--backend", "lm_eval"])


def test_the_launcher_checks_and_starts_it(results: Path, tmp_path: Path) -> None:
    """A wrong layout ends before a rank starts; the verb prints lm-eval's list of tasks in one process."""
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "modellink.cli", *words], cwd=tmp_path, capture_output=True,
                              text=True, env={**os.environ, "PYTHONPATH": str(REPO)})

    launched = ["launch", "--nproc-per-node", "2", str(REPO / "evaluation.py"), "--backend", "lm-eval", "--load",
                str(results / "model"), "--tokenizer-name-or-path", str(results / "model"), "--device", "cpu",
                "--tensor-model-parallel-size", "4", "--tasks", "own_choice"]
    with ThreadPoolExecutor() as pool:
        refused = pool.submit(run, *launched)
        listed = pool.submit(run, "eval", "--backend", "lm-eval", "validate", "--tasks", "own_write", "--include_path",
                             str(results / "tasks"))
    assert refused.result().returncode == 2 and "world size 2" in refused.result().stderr
    assert listed.result().returncode == 0 and "own_write" in listed.result().stdout, listed.result()
