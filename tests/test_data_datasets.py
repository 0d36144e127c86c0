"""Splits, blends, the index cache of each node, mock data and the order of samples."""

import logging
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import random_documents, write_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from modellink.config import ConfigError
from modellink.data import index_cache
from modellink.data.blend import BlendedDataset, blend_indices, parse_blend
from modellink.data.datasets import build_datasets, parse_split
from modellink.data.gpt_dataset import GPTDataset, sample_starts
from modellink.data.indexed import IndexedDataset
from modellink.data.mock import MockDataset
from modellink.data.sampling import microbatch_indices


def sets(**choice: Any) -> tuple[Any, Any, Any]:
    options: dict[str, Any] = {
        "data_path": None, "split": None, "train_data_path": None, "valid_data_path": None, "test_data_path": None,
        "mock": False, "vocab_size": 1000, "num_samples": (40, 0, 0), "seq_length": 16, "seed": 1, "cache_dir": None,
        "build": True, **choice}
    return build_datasets(**options)


def contents(dataset: Any) -> list[list[int]]:
    return [dataset[i]["tokens"].tolist() for i in range(len(dataset))]


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_documents(tmp_path / "data" / "a", random_documents(100, seed=5))


def test_one_epoch_holds_every_token_once(tmp_path: Path) -> None:
    documents = [np.arange(i * 100, i * 100 + 33, dtype=np.int32) for i in range(30)]
    indexed = IndexedDataset(write_documents(tmp_path / "a", documents))
    dataset = GPTDataset(indexed, (0, 30), None, 10, seed=3)
    seen = np.concatenate([dataset[i]["tokens"].numpy() for i in range(len(dataset))])
    assert len(seen) == len(set(seen.tolist())) == (30 * 33 - 1) // 10 * 10
    sample = dataset[0]
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert sample["tokens"].dtype == sample["labels"].dtype == torch.int64
    assert sample["loss_mask"].dtype == torch.float32 and bool((sample["loss_mask"] == 1).all())


def test_a_range_of_documents_is_kept(tmp_path: Path) -> None:
    documents = [np.full(20, i, np.int32) for i in range(50)]
    indexed = IndexedDataset(write_documents(tmp_path / "a", documents))
    dataset = GPTDataset(indexed, (10, 13), 500, 8, seed=3)
    assert {int(token) for i in range(len(dataset)) for token in dataset[i]["labels"]} == {10, 11, 12}


def test_sample_starts_widen_when_the_index_needs_it() -> None:
    sizes = np.array([2**31 - 1, 2**31 - 1], np.int32)
    starts = sample_starts(sizes, np.arange(2, dtype=np.int32), 3, 2**30)
    assert starts.tolist() == [[0, 0], [0, 2**30], [1, 1], [1, 2**30 + 1]]


@pytest.mark.parametrize(("split", "expected"), [
    ("969,30,1", [(0, 0.969), (0.969, 0.999), (0.999, 1.0)]), (None, [(0, 0.969), (0.969, 0.999), (0.999, 1.0)]),
    ("100,0,0", [(0, 1), None, None]), ("1", [(0, 1), None, None]), ("0.5, .5", [(0, 0.5), (0.5, 1), None]),
    ("0,0,3", [None, None, (0, 1)])])
def test_split(split: str | None, expected: list[tuple[float, float] | None]) -> None:
    for ours, wanted in zip(parse_split(split), expected, strict=True):
        assert ours == wanted if wanted is None else ours == pytest.approx(wanted)


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "0,0,0", "-1,2", "1,,2"])
def test_wrong_split(split: str) -> None:
    with pytest.raises(ConfigError, match="--split"):
        parse_split(split)


def test_a_split_without_documents_is_none(data: str, caplog: pytest.LogCaptureFixture) -> None:
    train, valid, test = sets(data_path=[data], split="999,1,0", num_samples=(40, 5, 5))
    assert isinstance(train, GPTDataset) and valid is None and test is None
    assert "no documents fall into the valid split" in caplog.text


def test_sets_that_are_not_wanted_are_not_built(data: str) -> None:
    assert sets(data_path=[data], num_samples=(0, 0, 0)) == (None, None, None)


def test_train_and_valid_share_no_document(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "a", [np.full(20, i, np.int32) for i in range(50)])
    train, valid, _ = sets(data_path=[prefix], split="80,20,0", num_samples=(300, 100, 0))
    seen = [{token for row in contents(part) for token in row} for part in (train, valid)]
    assert seen[0] == set(range(40)) and seen[1] == set(range(40, 50))


@pytest.mark.parametrize(("choice", "said"), [
    ({}, "--data-path is missing"),
    ({"mock": True, "data_path": ["A"]}, "--mock-data with --data-path"),
    ({"data_path": ["A"], "valid_data_path": ["A"]}, "--data-path with --valid-data-path"),
    ({"train_data_path": ["A"], "split": "1,1,1"}, "--split 1,1,1 with --train-data-path"),
    ({"valid_data_path": ["A"]}, "--train-data-path is missing"),
    ({"data_path": ["A"], "split": "0,1,1"}, "nothing is left for training"),
    ({"data_path": ["0.5", "A", "B"]}, "a weight before every prefix"),
    ({"data_path": ["A", "0.5"]}, "a weight before every prefix"),
    ({"data_path": ["0.5", "A", "B", "A"]}, "a weight before every prefix"),
    ({"data_path": ["0", "A", "1", "A"]}, "a number above 0"),
    ({"data_path": ["-1", "A", "1", "A"]}, "a number above 0"),
    ({"data_path": ["nan", "A", "1", "A"]}, "a number above 0"),
    ({"data_path": ["A"], "seq_length": 10_000, "num_samples": (1, 0, 0), "train_data_path": None,
      "split": "1"}, None),  # many epochs make one long sample: fine
    ({"data_path": ["A", "A"], "seq_length": 10_000}, "fewer than one sample of --seq-length 10000"),
])
def test_wrong_choices(data: str, choice: dict[str, Any], said: str | None) -> None:
    def real(words: Any) -> Any:
        return [data if word == "A" else word for word in words] if isinstance(words, list) else words

    choice = {name: real(value) for name, value in choice.items()}
    if said is None:
        assert len(sets(**choice)[0]) >= 1
        return
    with pytest.raises(ConfigError, match=said) as caught:
        sets(**choice)
    assert len(caught.value.problems) == 1


def test_all_missing_data_is_reported_at_once(data: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sets(data_path=[data + "x", data, data + "y"])
    assert [f"did you mean {data}?" in text for text in caught.value.problems] == [True, True]


def test_a_token_beyond_the_vocabulary_is_an_error(data: str) -> None:
    train, _, _ = sets(data_path=[data], vocab_size=600)
    with pytest.raises(ConfigError, match=r"a\.bin: it holds the token id \d+, .* vocabulary has 600 rows"):
        contents(train)


def test_blend_forms() -> None:
    assert parse_blend(["A"], "--x") == (["A"], None)
    assert parse_blend(["A", "B"], "--x") == (["A", "B"], None)
    assert parse_blend(["30", "A", "70", "B"], "--x") == (["A", "B"], [0.3, 0.7])


def test_blend_gives_the_asked_shares(tmp_path: Path) -> None:
    prefixes = [write_documents(tmp_path / name, [np.full(20, token, np.int32)] * 60)
                for token, name in enumerate("ab")]
    train, _, _ = sets(data_path=["0.3", prefixes[0], "0.7", prefixes[1]], num_samples=(100, 0, 0), split="100,0,0")
    firsts = [row[0] for row in contents(train)]
    for count in (10, 50, 100):
        assert abs(firsts[:count].count(0) - 0.3 * count) <= 1


def test_blend_without_weights_goes_on_past_one_epoch(tmp_path: Path) -> None:
    prefixes = [write_documents(tmp_path / name, [np.full(20, token, np.int32)] * count)
                for token, (name, count) in enumerate((("a", 60), ("b", 20)))]
    train, _, _ = sets(data_path=prefixes, num_samples=(1000, 0, 0), split="100,0,0")
    assert isinstance(train, BlendedDataset) and len(train) >= 1000
    assert sum(row[0] == 0 for row in contents(train)[:1000]) == pytest.approx(750, abs=5)


def test_a_large_share_among_many_small_ones_has_enough_samples(tmp_path: Path) -> None:
    prefixes = [write_documents(tmp_path / f"p{i}", random_documents(20, seed=i, shortest=10)) for i in range(60)]
    words = ["59", prefixes[0], *(word for prefix in prefixes[1:] for word in ("1", prefix))]
    train, _, _ = sets(data_path=words, num_samples=(10, 0, 0), split="100,0,0", seq_length=32)
    assert len(train) >= 64 and len(contents(train)) == len(train)
    assert abs(np.bincount(train.dataset_index)[0] - len(train) / 2) <= 1


def test_hundred_sources_keep_their_shares() -> None:
    weights = (np.arange(1, 101) / 5050).tolist()
    which, _ = blend_indices(weights, 5050)
    assert np.abs(np.bincount(which, minlength=100) - np.arange(1, 101)).max() <= 1


def test_every_node_reads_its_own_index_cache(tmp_path: Path, data: str) -> None:
    """Two nodes without a shared disk: each sees its own copy of the data and its own cache folder."""
    copy = tmp_path / "node1" / "b"
    copy.parent.mkdir()
    for suffix in (".bin", ".idx"):
        Path(f"{copy}{suffix}").write_bytes(Path(data + suffix).read_bytes())
    words = {0: ["0.4", data, "0.6", data], 1: ["0.4", str(copy), "0.6", str(copy)]}
    caches = {node: tmp_path / f"cache{node}" for node in words}
    order = {}
    for node, cache in caches.items():
        sets(data_path=words[node], cache_dir=cache, num_samples=(40, 9, 0), split="80,20,0", build=True)
        built = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
        train, valid, _ = sets(data_path=words[node], cache_dir=cache, num_samples=(40, 9, 0), split="80,20,0",
                               build=False)
        assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == built
        for array in (train.dataset_index, train.datasets[0].sample_index, valid.datasets[1].shuffle_index):
            assert isinstance(array, np.memmap) and Path(array.filename).parent == cache
        order[node] = contents(train)
    assert order[0] == order[1]
    assert not (Path(data) / "cache").exists()


def test_the_default_cache_lies_beside_the_data(data: str) -> None:
    train, _, _ = sets(data_path=[data])
    assert Path(train.shuffle_index.filename).parent == Path(data) / "cache" / "GPTDataset_indices"


def test_a_stale_cache_is_never_read(tmp_path: Path, data: str) -> None:
    cache = tmp_path / "cache"
    before = contents(sets(data_path=[data], cache_dir=cache)[0])
    write_documents(Path(data), random_documents(100, seed=9))  # as many documents, other lengths
    fresh = contents(sets(data_path=[data], cache_dir=tmp_path / "other")[0])
    assert contents(sets(data_path=[data], cache_dir=cache)[0]) == fresh != before


@pytest.mark.parametrize("change", [{"seed": 2}, {"seq_length": 17}, {"num_samples": (41, 0, 0)}, {"split": "1,1,0"}])
def test_other_settings_have_their_own_cache(tmp_path: Path, data: str, change: dict[str, Any]) -> None:
    cache = tmp_path / "cache"
    sets(data_path=[data], cache_dir=cache)
    before = len(list(cache.iterdir()))
    sets(data_path=[data], cache_dir=cache, **change)
    assert len(list(cache.iterdir())) == 2 * before


def test_a_cache_that_cannot_be_written_is_said_once(tmp_path: Path, data: str,
                                                     caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    caplog.set_level(logging.WARNING)
    index_cache._warned.clear()
    train, valid, _ = sets(data_path=[data], cache_dir=tmp_path / "file" / "cache", num_samples=(40, 5, 0))
    other_rank, _, _ = sets(data_path=[data], cache_dir=tmp_path / "elsewhere", build=False)
    assert [record.getMessage().split(":")[1] for record in caplog.records if "cannot write" in record.getMessage()] \
        == [" cannot write the index cache (Not a directory); every rank keeps its own in memory, --data-cache-path "
            "moves the cache to a folder that can be written."]
    assert contents(train) == contents(other_rank) == contents(sets(data_path=[data])[0])
    assert not (tmp_path / "elsewhere").exists()


def _build(data: str, cache: Path) -> int:
    return len(sets(data_path=[data], cache_dir=cache, num_samples=(3000, 0, 0))[0])


def test_several_builders_do_no_harm(tmp_path: Path, data: str) -> None:
    """Nodes that do share a disk write the same files at the same time."""
    cache = tmp_path / "cache"
    with multiprocessing.get_context("fork").Pool(4) as pool:
        lengths = pool.starmap(_build, [(data, cache)] * 8)
    assert len(set(lengths)) == 1 and len(list(cache.iterdir())) == 3
    assert contents(sets(data_path=[data], cache_dir=cache, num_samples=(3000, 0, 0), build=False)[0]) \
        == contents(sets(data_path=[data], num_samples=(3000, 0, 0))[0])


def test_mock_data() -> None:
    train, valid, test = sets(mock=True, vocab_size=101, num_samples=(30, 4, 0), seq_length=200)
    assert test is None and len(train) == 30 and len(valid) == 4
    assert contents(train) == contents(MockDataset(101, 200, 30, 1)) != contents(MockDataset(101, 200, 30, 2))
    assert contents(train)[:4] != contents(valid)
    for i in range(30):
        tokens, labels = train[i]["tokens"].numpy(), train[i]["labels"].numpy()
        assert tokens[1:].tolist() == labels[:-1].tolist() and tokens.min() >= 0 and tokens.max() < 101
        steps = np.bincount((labels - tokens) % 101)
        assert 1 <= steps.argmax() <= 4 and steps.max() > 150  # one step rules, noise is rare: it can be learned
    with pytest.raises(IndexError):
        train[30]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 100), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_a_step_takes_the_next_samples_once(consumed: int, micro: int, ranks: int, count: int) -> None:
    per_rank = [microbatch_indices(consumed, micro, rank, ranks, count) for rank in range(ranks)]
    in_order = [sample for k in range(count) for rank in range(ranks) for sample in per_rank[rank][k]]
    assert in_order == list(range(consumed, consumed + micro * ranks * count))
    assert all(len(batch) == micro for batches in per_rank for batch in batches)


def test_sampling_follows_megatrons_sampler() -> None:
    assert microbatch_indices(6, 2, 1, 3, 2) == [[8, 9], [14, 15]]


def test_a_resumed_run_continues_the_order_in_another_layout(data: str) -> None:
    train, _, _ = sets(data_path=[data], num_samples=(48, 0, 0))

    def texts(consumed: int, micro: int, ranks: int, count: int) -> list[list[int]]:
        found = {sample: train[sample]["tokens"].tolist() for rank in range(ranks)
                 for batch in microbatch_indices(consumed, micro, rank, ranks, count) for sample in batch}
        return [found[sample] for sample in sorted(found)]

    through = texts(0, 2, 2, 4) + texts(16, 2, 2, 4) + texts(32, 2, 2, 4)
    assert texts(0, 2, 2, 4) + texts(16, 4, 1, 4) + texts(32, 1, 4, 4) == through == contents(train)[:48]
