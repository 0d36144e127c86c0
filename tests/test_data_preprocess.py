"""tools/preprocess_data.py: every format, the flags of the original, and every wrong input."""

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from data_helpers import make_tokenizer, paragraphs, topics

from modellink.config import run_command
from modellink.data import batches, json_list
from modellink.data.batches import Batch
from modellink.data.encode import TASKS_PER_WORKER, Encoded, Encoder, encode_in_workers
from modellink.data.handlers import make_handler
from modellink.data.indexed import IndexedDataset
from modellink.data.preprocess import main, preprocess
from modellink.data.readers import find_files, read_batches
from modellink.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
ALPACA = Path("/work/shared/data/alpaca/train-00000-of-00001-a09b74b3ef9c3b56.parquet")
TEXTS = [*paragraphs(60), 'say "hi", twice\n\nand, again', "", "你好，世界 😀", "  spaces  ", "a\r\nb", "last"]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Any:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture
def run(tokenizer_folder: Path, tmp_path: Path) -> Callable[..., int]:
    def call(source: Path, *more: str, prefix: str = "out/set") -> int:
        return run_command(main, ["--input", str(source), "--tokenizer-name-or-path", str(tokenizer_folder),
                                  "--output-prefix", str(tmp_path / prefix), *more])

    return call


def written(prefix: Path) -> list[list[int]]:
    indexed = IndexedDataset(prefix)
    return [indexed.get(i).tolist() for i in range(len(indexed))]


def expected(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return [ids for ids in (tokenizer(text)["input_ids"] for text in texts) if ids]


def write_jsonl(path: Path, texts: list[str], **other: Any) -> Path:
    path.write_text("".join(json.dumps({"id": 1, "text": text, **other}) + "\n" for text in texts), encoding="utf-8")
    return path


def write_json(path: Path, texts: list[str]) -> Path:
    path.write_text(json.dumps([{"text": text} for text in texts], indent=2, ensure_ascii=False), encoding="utf-8")
    return path


def write_csv(path: Path, texts: list[str]) -> Path:
    with open(path, "w", newline="", encoding="utf-8-sig") as handle:
        csv.writer(handle).writerows([["id", "text"], *([i, text] for i, text in enumerate(texts))])
    return path


def table(texts: list[str]) -> pyarrow.Table:
    return pyarrow.table({"id": list(range(len(texts))), "text": texts})


def write_parquet(path: Path, texts: list[str]) -> Path:
    pyarrow.parquet.write_table(table(texts), path, row_group_size=7)
    return path


def write_arrow_stream(path: Path, texts: list[str]) -> Path:
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table(texts).schema) as writer:
        writer.write_table(table(texts), max_chunksize=7)
    return path


def write_arrow_file(path: Path, texts: list[str]) -> Path:
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table(texts).schema) as writer:
        writer.write_table(table(texts), max_chunksize=7)
    return path


def write_gzip(path: Path, texts: list[str]) -> Path:
    plain = write_jsonl(path.with_suffix(""), texts)
    path.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    return path


@pytest.mark.parametrize(("name", "write"), [
    ("a.jsonl", write_jsonl), ("a.json", write_json), ("lines.json", write_jsonl), ("a.csv", write_csv),
    ("a.parquet", write_parquet), ("stream.arrow", write_arrow_stream), ("file.arrow", write_arrow_file),
    ("a.jsonl.gz", write_gzip)])
def test_every_format_gives_the_tokenizers_own_ids(tmp_path: Path, run: Callable[..., int], tokenizer: Any, name: str,
                                                   write: Callable[[Path, list[str]], Path],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "BATCH_ROWS", 8)  # many small batches over two workers: the order must hold
    monkeypatch.setattr(json_list, "READ_CHARACTERS", 11)
    assert run(write(tmp_path / name, TEXTS), "--workers", "2") == 0
    assert written(tmp_path / "out/set_text_document") == expected(tokenizer, TEXTS)
    assert IndexedDataset(tmp_path / "out/set_text_document").dtype == "int32"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["set_text_document.bin",
                                                                          "set_text_document.idx"]


def test_txt_has_one_document_per_line(tmp_path: Path, run: Callable[..., int], tokenizer: Any,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone line\r\n\n  two \n\nthree".encode())
    assert run(tmp_path / "a.txt") == 0
    assert written(tmp_path / "out/set_text_document") == expected(tokenizer, ["one line", "  two ", "three"])
    assert "3 documents" in capsys.readouterr().out


def test_long_documents_cross_no_batch_border(tmp_path: Path, run: Callable[..., int], tokenizer: Any) -> None:
    texts = [*topics()[:30], "x" * 700_000, "end"]  # larger than a batch
    assert run(write_jsonl(tmp_path / "a.jsonl", texts), "--workers", "2") == 0
    assert written(tmp_path / "out/set_text_document") == expected(tokenizer, texts)


def test_append_eod_and_seq_length(tmp_path: Path, run: Callable[..., int], tokenizer: Any,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["a", "a b c d e f g", "", "a b"])
    assert run(source, "--append-eod", "--seq-length", "3") == 0
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert written(tmp_path / "out/set_text_document") == [[*tokenizer("a")["input_ids"], end],
                                                           [*tokenizer("a b")["input_ids"], end]]
    out = capsys.readouterr().out
    assert "2 documents, 5 tokens, 1 empty left out, 1 longer than --seq-length dropped" in out
    assert "tokens/s" in out and "per worker" in out


def test_each_key_has_its_own_files(tmp_path: Path, run: Callable[..., int], tokenizer: Any) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"], title="head")
    assert run(source, "--json-keys", "title", "text") == 0
    assert written(tmp_path / "out/set_title_document") == expected(tokenizer, ["head", "head"])
    assert written(tmp_path / "out/set_text_document") == expected(tokenizer, ["one", "two"])


def test_null_is_an_empty_document(tmp_path: Path, run: Callable[..., int], tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n\n{"text": "b"}\n')
    assert run(tmp_path / "a.jsonl") == 0
    assert written(tmp_path / "out/set_text_document") == expected(tokenizer, ["b"])


def test_a_folders_most_frequent_format_wins(tmp_path: Path, run: Callable[..., int], tokenizer: Any,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "b.jsonl", ["three", "four"])
    write_jsonl(folder / "a.jsonl", ["one", "two"])
    write_csv(folder / "c.csv", ["not this"])
    (folder / "README.md").write_text("x")
    assert run(folder) == 0
    assert written(tmp_path / "out/set_text_document") == expected(tokenizer, ["one", "two", "three", "four"])
    assert "leaving out README.md, c.csv" in capsys.readouterr().err


def test_overwrite(tmp_path: Path, run: Callable[..., int], tokenizer: Any,
                   capsys: pytest.CaptureFixture[str]) -> None:
    assert run(write_jsonl(tmp_path / "a.jsonl", ["one"])) == 0
    assert run(write_jsonl(tmp_path / "a.jsonl", ["two"])) == 2
    assert "the output exists already; give --overwrite" in capsys.readouterr().err
    assert written(tmp_path / "out/set_text_document") == expected(tokenizer, ["one"])
    assert run(tmp_path / "a.jsonl", "--overwrite") == 0
    assert written(tmp_path / "out/set_text_document") == expected(tokenizer, ["two"])


def test_the_originals_flags_are_accepted_and_said_once(tmp_path: Path, run: Callable[..., int],
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    code = run(write_jsonl(tmp_path / "a.jsonl", ["one"]), "--handler-name", "GeneralPretrainHandler", "--streaming",
               "--hf-datasets-params", "p.json", "--datasets", "x", "--json-keys", "text", "--keep-newlines",
               "--tokenizer-type", "PretrainedFromHF", "--tokenizer-not-use-fast", "--vocab-file", "v.json",
               "--merge-file", "m.txt", "--append-eod", "--seq-length", "100", "--make-vocab-size-divisible-by", "16",
               "--pad-vocab-size-to", "151936", "--dataset-impl", "mmap", "--workers", "1", "--log-interval", "1")
    captured = capsys.readouterr()
    assert code == 0
    assert captured.err.count("without effect") == 1
    for flag in ("streaming", "hf-datasets-params", "datasets", "keep-newlines", "vocab-file", "merge-file",
                 "make-vocab-size-divisible-by", "pad-vocab-size-to", "dataset-impl"):
        assert f"--{flag} (" in captured.err
    assert "processed 1 documents" in captured.out


@pytest.mark.skipif(not ALPACA.exists(), reason=f"{ALPACA} is not on this machine")
def test_the_readmes_command(tmp_path: Path, tokenizer_folder: Path, tokenizer: Any) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / ALPACA.name).symlink_to(ALPACA)
    (tmp_path / "model_from_hf").mkdir()
    (tmp_path / "model_from_hf" / "Qwen1.5-7B").symlink_to(tokenizer_folder)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    done = subprocess.run(
        [sys.executable, "./tools/preprocess_data.py", "--input", f"./dataset/{ALPACA.name}",
         "--tokenizer-name-or-path", "./model_from_hf/Qwen1.5-7B/", "--output-prefix", "./dataset/Qwen1.5-7B/alpaca",
         "--workers", "4", "--log-interval", "1000", "--tokenizer-type", "PretrainedFromHF"],
        cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    texts = pyarrow.parquet.read_table(ALPACA)["text"].to_pylist()
    assert written(tmp_path / "dataset/Qwen1.5-7B/alpaca_text_document") == expected(tokenizer, texts)


BROKEN: dict[str, tuple[str, Any, list[str], str]] = {
    "missing input": ("a.jsonl", None, [], "a.jsonl: no such file or folder"),
    "near match": ("b.jsonl", b'{"text": "x"}', ["--input", "b.jsonk"], "did you mean b.jsonl?"),
    "empty file": ("a.jsonl", b"", [], "the file is empty"),
    "only blank lines": ("a.txt", b"\n\n", [], "2 documents are empty"),
    "only long documents": ("a.txt", b"a b c\n", ["--seq-length", "1"], "1 longer than --seq-length"),
    "broken line": ("a.jsonl", b'{"text": "x"}\n\n{"text": "x"\n', [], "a.jsonl, line 3: broken JSON"),
    "number on a line": ("a.jsonl", b'{"text": "x"}\n17\n', [], "line 2: a JSON int where an object is needed"),
    "broken list": ("a.json", b'[\n{"text": "x"},\n{"text" "y"}\n]', [], "a.json, line 3: broken JSON"),
    "list without a comma": ("a.json", b'[{"text": "x"}\n{"text": "y"}]', [], "a.json, line 2: broken JSON: expected"),
    "open list": ("a.json", b'[{"text": "x"},\n', [], "a.json, line 2: broken JSON"),
    "unclosed list": ("a.json", b'[{"text": "x"}\n', [], "found the end of the file"),
    "empty list": ("a.json", b"[ ]", [], "nothing to write"),
    "one object over lines": ("a.json", b'{\n"text": "x"\n}\n', [], "a.json, line 1: broken JSON"),
    "missing column": ("a.jsonl", b'{"texts": "x", "id": 1}\n', [], "line 1: no column 'text', the columns are texts"),
    "missing csv column": ("a.csv", b"id,txt\n1,x\n", [], "no column 'text', the columns are id, txt"),
    "short csv row": ("a.csv", b"id,text\n1,x\n2\n", [], "a.csv, line 3: 1 fields where the header has 2"),
    "broken csv": ("a.csv", b'id,text\n1,"x"y\n', [], "a.csv, line 2: not valid CSV"),
    "txt column": ("a.txt", b"x\n", ["--json-keys", "body"], "no column 'body', the columns are text"),
    "number in the column": ("a.jsonl", b'{"text": 5}\n', [], "line 1: column 'text' holds a int where text"),
    "half a character": ("a.jsonl", b'{"text": "\\ud83d"}\n', [], "line 1: column 'text' holds half a character"),
    "not utf-8 jsonl": ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', [], "line 2: not UTF-8"),
    "not utf-8 txt": ("a.txt", b"x\n\xff\n", [], "line 2: not UTF-8"),
    "not utf-8 csv": ("a.csv", b"text\n\xff\n", [], "a.csv: not UTF-8"),
    "not utf-8 json": ("a.json", b'[{"text": "\xff"}]', [], "a.json: not UTF-8"),
    "unknown extension": ("a.docx", b"x", [], "unknown format .docx; use one of parquet, arrow, jsonl"),
    "no extension": ("a", b"x", [], "unknown format (no extension)"),
    "lfs pointer": ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", [], "git-lfs pointer"),
    "html page": ("a.parquet", b"<!DOCTYPE html><html></html>", [], "HTML page"),
    "cut parquet": ("a.parquet", b"PAR1 and then nothing", [], "not a whole parquet file"),
    "cut arrow": ("a.arrow", b"ARROW1 and then nothing", [], "not a whole arrow file"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999)[:-9], [], "cannot read"),
    "not gzip": ("a.jsonl.gz", b'{"text": "x"}\n', [], "cannot read"),
    "two values": ("a.jsonl", b'{"text": "x"}', ["--workers", "1", "2"], "2: a value without a flag"),
    "second input missing": ("a.jsonl", b'{"text": "x"}', ["--input", "a.jsonl", "b"], "b: no such file or folder"),
    "no workers": ("a.jsonl", b'{"text": "x"}', ["--workers", "0"], "--workers 0: must be 1 or more"),
    "no interval": ("a.jsonl", b'{"text": "x"}', ["--log-interval", "0"], "--log-interval 0: must be 1 or more"),
    "no length": ("a.jsonl", b'{"text": "x"}', ["--seq-length", "0"], "--seq-length 0: must be 1 or more"),
    "unknown handler": ("a.jsonl", b'{"text": "x"}', ["--handler-name", "Belle"], "there is GeneralPretrainHandler"),
    "sentences": ("a.jsonl", b'{"text": "x"}', ["--split-sentences"], "--split-sentences: GPT training reads whole"),
    "other tokenizer": ("a.jsonl", b'{"text": "x"}', ["--tokenizer-type", "GPT2BPETokenizer"], "only PretrainedFromHF"),
    "column twice": ("a.jsonl", b'{"text": "x"}', ["--json-keys", "text", "text"], "text is named twice"),
    "no tokenizer": ("a.jsonl", b'{"text": "x"}', ["--tokenizer-name-or-path", "none"], "no such tokenizer folder"),
    "folder as prefix": ("a.jsonl", b'{"text": "x"}', ["--output-prefix", "out/"], "this is a folder"),
    "file in the way": ("a.jsonl", b'{"text": "x"}', ["--output-prefix", "a.jsonl/set"], "is a file, not a folder"),
    "unknown flag": ("a.jsonl", b'{"text": "x"}', ["--worker", "2"], "did you mean --workers"),
    "no input": ("a.jsonl", b'{"text": "x"}', ["--input", ""], "--input is missing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_wrong_input_is_one_sentence_and_leaves_nothing(tmp_path: Path, run: Callable[..., int], case: str,
                                                        capsys: pytest.CaptureFixture[str],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    name, content, more, said = BROKEN[case]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    assert run(Path(name), *more, prefix="new/deep/set") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("error: ") == 1 and "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before


def test_all_problems_are_shown_at_once(tmp_path: Path, run: Callable[..., int],
                                        capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "none", "--workers", "0", "--handler-name", "x", "--tokenizer-name-or-path", "y") == 2
    assert capsys.readouterr().err.count("error: ") == 4


def test_a_folder_without_known_files(tmp_path: Path, run: Callable[..., int],
                                      capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.md").write_text("x")
    assert run(tmp_path / "in") == 2
    assert "no file of a known format" in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True,
                             check=False)
    if mounted.returncode:
        pytest.skip("a small tmpfs cannot be mounted here: " + mounted.stderr.decode().strip())
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(tmp_path: Path, run: Callable[..., int], small_disk: Path,
                     capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", topics()[:20])
    assert run(source, prefix="disk/deep/set") == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and error.count("error: ") == 1
    assert not list(small_disk.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path, run: Callable[..., int],
                                         capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    assert run(write_jsonl(tmp_path / "a.jsonl", ["x"])) == 2
    assert "cannot be written" in capsys.readouterr().err


class _Fails(Encoder):
    """A worker with a bug: it raises at the text `raise` and dies at the text `die`."""

    def ids(self, texts: list[str]) -> list[list[int]]:
        if "raise" in texts:
            raise ZeroDivisionError("ours")
        if "die" in texts:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().ids(texts)


@pytest.mark.parametrize(("text", "error"), [("raise", ZeroDivisionError), ("die", BrokenProcessPool)])
@pytest.mark.timeout(60)
def test_a_worker_that_fails_ends_the_run(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, text: str,
                                          error: type[Exception]) -> None:
    monkeypatch.setattr(batches, "BATCH_ROWS", 2)
    files, kind, _ = find_files(write_jsonl(tmp_path / "a.jsonl", ["x"] * 30 + [text] + ["x"] * 300))
    encoder = _Fails(tokenizer, make_handler("GeneralPretrainHandler", ("text",)), False, None)
    with pytest.raises(error):  # a bug keeps its traceback
        preprocess(files, kind, [str(tmp_path / "out/set_text_document")], encoder, 2, 1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_input_is_read_no_faster_than_it_is_written(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, make_handler("GeneralPretrainHandler", ("text",)), False, None)
    read = 0

    def endless() -> Iterator[Batch]:
        nonlocal read
        while True:
            read += 1
            yield Batch(Path("x"), "line", [read], [(f"text {read}",)])

    results = encode_in_workers(endless(), encoder, 2)
    for done, (batch, (encoded,)) in enumerate(results, 1):
        assert batch.numbers == [done] and isinstance(encoded, Encoded)
        assert read <= done + 2 * TASKS_PER_WORKER
        if done == 50:
            break
    results.close()


def test_a_json_list_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = paragraphs(300)
    source = write_json(tmp_path / "a.json", texts)
    monkeypatch.setattr(json_list, "READ_CHARACTERS", 100)
    monkeypatch.setattr(batches, "BATCH_ROWS", 10)
    taken = read_batches([source], "json", ("text",))
    first = next(taken)
    assert len(first.rows) == 10
    rows = [*first.rows, *(row for batch in taken for row in batch.rows)]
    assert [json.loads(row)["text"] for row in rows] == texts
    lines = source.read_text().split("\n")
    assert all("{" in lines[number - 1] for number in first.numbers)
