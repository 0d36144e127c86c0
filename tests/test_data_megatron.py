"""Our token files, sample order and blends against megatron-core's own classes."""

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import random_documents, write_documents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modellink.data.blend import blend_indices
from modellink.data.datasets import build_datasets
from modellink.data.gpt_dataset import GPTDataset
from modellink.data.indexed import IndexedDataset, IndexedWriter


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def megatron_sets(sizes: list[int | None], seq_length: int, seed: int, cache: Path, **choice: Any) -> list[Any]:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset as CoreDataset
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    tokenizer = SimpleNamespace(vocab_size=100_000, eod=0, unique_identifiers={"class": "test"})
    config = GPTDatasetConfig(random_seed=seed, sequence_length=seq_length, tokenizer=tokenizer,
                              path_to_cache=str(cache), reset_position_ids=False, reset_attention_mask=False,
                              eod_mask_loss=False, create_attention_mask=False, **choice)
    # a blend reads the rank, so the builder wants a process group
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        return BlendedMegatronDatasetBuilder(CoreDataset, sizes, lambda: True, config).build()
    finally:
        torch.distributed.destroy_process_group()


def our_sets(sizes: tuple[int, int, int], seq_length: int, seed: int, cache: Path, **choice: Any) -> tuple[Any, ...]:
    options: dict[str, Any] = {"data_path": None, "split": None, "train_data_path": None, "valid_data_path": None,
                               "test_data_path": None, "mock": False, "vocab_size": 100_000, "build": True, **choice}
    return build_datasets(num_samples=sizes, seq_length=seq_length, seed=seed, cache_dir=cache, **options)


def assert_same(ours: Any, core: Any, at_least: int) -> None:
    assert len(ours) == len(core) >= at_least
    for i in range(len(ours)):
        for name in ("tokens", "labels", "loss_mask"):
            assert torch.equal(ours[i][name], core[i][name]), (i, name)
            assert ours[i][name].dtype == core[i][name].dtype


@pytest.mark.parametrize("count", [0, 1, 257])
def test_files_equal_megatron_core_byte_for_byte(tmp_path: Path, count: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    documents = random_documents(count, seed=count, vocab_size=151_646)
    builder = IndexedDatasetBuilder(str(tmp_path / "core.bin"), dtype=np.int32)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "core.idx"))
    with IndexedWriter(tmp_path / "ours") as writer:
        for start in range(0, count, 100):  # several bulk appends
            part = documents[start:start + 100]
            writer.append(np.concatenate(part), np.array([len(document) for document in part], np.int32))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"core{suffix}").read_bytes()
    if count:
        reader = IndexedDataset(tmp_path / "ours")
        assert all(np.array_equal(reader.get(i), document) for i, document in enumerate(documents))
        assert reader.get(0, 0, 1).tolist() == documents[0][:1].tolist()


def test_index_blocks_join_seamlessly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = random_documents(50, seed=1)
    write_documents(tmp_path / "whole", documents)
    monkeypatch.setattr("modellink.data.indexed.BLOCK", 7)
    write_documents(tmp_path / "blocks", documents)
    assert (tmp_path / "whole.idx").read_bytes() == (tmp_path / "blocks.idx").read_bytes()
    assert len(IndexedDataset(tmp_path / "blocks")) == 50


# the sizes give less than an epoch, whole epochs, and a last epoch below and above the threshold of 0.8
@pytest.mark.parametrize("samples", [1, 100, 230, 300, 400, 455, 460, 1500])
@pytest.mark.parametrize("seq_length", [9, 16])
def test_samples_equal_megatron_core(tmp_path: Path, samples: int, seq_length: int) -> None:
    prefix = write_documents(tmp_path / "data", random_documents(200, seed=3, shortest=0))
    core = megatron_sets([samples, 17, 0], seq_length, 42, tmp_path / "core", blend=([prefix], None), split="90,10,0")
    ours = our_sets((samples, 17, 0), seq_length, 42, tmp_path / "ours", data_path=[prefix], split="90,10,0")
    assert_same(ours[0], core[0], samples)
    assert_same(ours[1], core[1], 17)
    assert ours[2] is None


def test_another_seed_gives_another_order(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "data", random_documents(100, seed=3))
    first, second = (GPTDataset(IndexedDataset(prefix), (0, 100), 50, 16, seed) for seed in (1, 2))
    assert not torch.equal(first[0]["tokens"], second[0]["tokens"])


# without weights megatron-core ends after one epoch, so the large size is for weights only
@pytest.mark.parametrize(("words", "size"), [
    (["0.3", "A", "0.7", "B"], 200), (["5", "A", "1", "B", "94", "C"], 200), (["1.0", "B"], 200),
    (["A", "B", "C"], 200), (["A", "B"], 200),
    (["0.3", "A", "0.7", "B"], 2200), (["5", "A", "1", "B", "94", "C"], 2200), (["1.0", "B"], 2200)])
def test_blends_equal_megatron_core(tmp_path: Path, words: list[str], size: int) -> None:
    from megatron.core.datasets.utils import get_blend_from_list

    for i, name in enumerate("ABC"):
        write_documents(tmp_path / name, random_documents(150 + 100 * i, seed=i))
    words = [str(tmp_path / word) if word.isalpha() else word for word in words]
    core = megatron_sets([size, 7, 3], 16, 7, tmp_path / "core", blend=get_blend_from_list(words), split="8,1,1")
    ours = our_sets((size, 7, 3), 16, 7, tmp_path / "ours", data_path=words, split="8,1,1")
    for our, theirs, wanted in zip(ours, core, (size, 7, 3)):
        assert_same(our, theirs, wanted)


def test_paths_per_split_equal_megatron_core(tmp_path: Path) -> None:
    a, b, c = (write_documents(tmp_path / name, random_documents(90, seed=i)) for i, name in enumerate("abc"))
    core = megatron_sets([120, 30, 20], 16, 7, tmp_path / "core",
                         blend_per_split=[([a, b], [0.25, 0.75]), ([c], None), ([a], None)])
    ours = our_sets((120, 30, 20), 16, 7, tmp_path / "ours", train_data_path=["0.25", a, "0.75", b],
                    valid_data_path=[c], test_data_path=[a])
    for our, theirs, size in zip(ours, core, (120, 30, 20)):
        assert_same(our, theirs, size)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 400))
def test_blend_order_is_megatron_cores_and_shares_hold_everywhere(weights: list[float], size: int) -> None:
    from megatron.core.datasets import helpers

    shares = (np.array(weights) / np.sum(weights)).tolist()
    which, number = blend_indices(shares, size)
    core_which, core_number = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers.build_blending_indices(core_which, core_number, shares, len(shares), size, False)
    assert np.array_equal(which, core_which) and np.array_equal(number, core_number)
    if len(shares) == 2:  # within one sample of the asked share in every prefix, not just at the end
        seen = np.cumsum(which == 0)
        assert np.all(np.abs(seen - shares[0] * np.arange(1, size + 1)) <= 1 + 1e-9)
    for i in range(len(shares)):
        assert number[which == i].tolist() == list(range(int((which == i).sum())))
