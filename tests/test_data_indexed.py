"""Token files that are missing, cut or broken: one sentence each."""

import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_helpers import random_documents, write_documents

from modellink.config import ConfigError
from modellink.data.indexed import IndexedDataset, IndexedWriter


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return Path(write_documents(tmp_path / "set" / "alpaca_text_document", random_documents(20, seed=0)))


def problem(path: Path | str) -> str:
    with pytest.raises(ConfigError) as caught:
        IndexedDataset(path)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def change(path: Path, edit: Callable[[bytearray], None]) -> None:
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_a_suffix_on_the_prefix_is_understood(prefix: Path, suffix: str) -> None:
    assert len(IndexedDataset(f"{prefix}{suffix}")) == 20


@pytest.mark.parametrize("asked", ["set/alpaca_text_documen", "set/alpaca", "alpaca_text_document",
                                   "other/alpaca_text_document", "set/alpaca_text_dokument.bin"])
def test_missing_data_shows_the_near_match(prefix: Path, tmp_path: Path, asked: str) -> None:
    (tmp_path / "other").mkdir()
    write_documents(tmp_path / "set" / "alpacb", random_documents(2, seed=0))
    text = problem(tmp_path / asked)
    assert "no such data set" in text and f"did you mean {prefix}?" in text


def test_missing_folder_names_the_last_one_that_exists(tmp_path: Path) -> None:
    assert str(tmp_path) in problem(tmp_path / "no" / "such" / "thing")


def test_missing_half_of_the_pair(prefix: Path) -> None:
    Path(f"{prefix}.bin").unlink()
    assert "alpaca_text_document.bin is missing" in problem(prefix)


def test_truncated_bin(prefix: Path) -> None:
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes()[:-4])
    assert re.search(r"\.bin: it was cut short: its index asks for \d+ bytes, it has \d+", problem(prefix))


def test_bin_of_another_run(prefix: Path) -> None:
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes() + b"1234")
    assert "not of one run" in problem(prefix)


def test_bin_is_a_pointer(prefix: Path) -> None:
    Path(f"{prefix}.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "git-lfs pointer" in problem(prefix)


def test_index_is_a_web_page(prefix: Path) -> None:
    Path(f"{prefix}.idx").write_bytes(b"<!DOCTYPE html><html></html>" + b" " * 100)
    assert "HTML page" in problem(prefix)


@pytest.mark.parametrize(("edit", "said"), [
    (lambda data: data.__setitem__(0, 0), "must start with b'MMIDIDX"),
    (lambda data: data.__setitem__(slice(9, 17), struct.pack("<Q", 2)), "version is 2 and must be 1"),
    (lambda data: data.__setitem__(17, 9), "dtype code is 9"),
    (lambda data: data.__setitem__(17, 0), "dtype code is 0"),
    (lambda data: data.__setitem__(17, 7), "dtype is float32"),
    (lambda data: data.__delitem__(slice(-8, None)), "20 sequences and 21 marks need"),
    (lambda data: data.__delitem__(slice(20, None)), "its header alone needs 34"),
    (lambda data: data.__setitem__(slice(38, 42), struct.pack("<i", 99)), "offset of sequence 2 does not follow"),
    (lambda data: data.__setitem__(slice(38, 42), struct.pack("<i", -1)), "sequence 1 has the length -1"),
    (lambda data: data.__setitem__(slice(-8, None), struct.pack("<q", 19)), "marks must run from 0 to 20"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_corrupt_index(prefix: Path, edit: Callable[[bytearray], None], said: str) -> None:
    change(Path(f"{prefix}.idx"), edit)
    assert said in problem(prefix)


@pytest.mark.parametrize("dtype", [np.uint16, np.int64, np.int32])
def test_other_integer_types_are_read(tmp_path: Path, dtype: type) -> None:
    with IndexedWriter(tmp_path / "x", dtype) as writer:
        writer.append(np.array([1, 2, 3, 60000]), np.array([3, 1], np.int32))
    reader = IndexedDataset(tmp_path / "x")
    assert reader.dtype == dtype
    assert reader.get(0, 1).tolist() == [2, 3] and reader.get(1).tolist() == [60000]


def test_a_failed_write_leaves_the_old_files(prefix: Path) -> None:
    before = {path.name: path.read_bytes() for path in prefix.parent.iterdir()}
    with pytest.raises(KeyError), IndexedWriter(prefix) as writer:
        writer.append(np.arange(5), np.array([5], np.int32))
        raise KeyError
    assert {path.name: path.read_bytes() for path in prefix.parent.iterdir()} == before


def test_lengths_that_do_not_fit_the_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="add up"), IndexedWriter(tmp_path / "x") as writer:
        writer.append(np.arange(5), np.array([4], np.int32))
    assert not list(tmp_path.iterdir())
