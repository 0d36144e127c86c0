"""The training, validation and test sets of a run."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from modellink.data.datasets import build_datasets
from modellink.data.instruction_dataset import build_instruction_datasets, dataset_bins, open_streams
from modellink.data.packing import PackedDataset
from modellink.data.pair_dataset import build_pair_datasets
from modellink.models.run import Run
from modellink.parallel.rank import Rank
from modellink.training.batches import BatchSizes

Sets = tuple[Any, Any, Any]


def load_data(run: Run) -> Sets:
    """Training, validation and test sets; local rank 0 of each node builds the index cache, then the others read it."""
    build = {"text": _text_sets, "instruction": _instruction_sets, "pairs": _pair_sets}[run.settings.data_kind]
    first = Rank.from_environment().local_rank == 0
    sets = build(run, True) if first else (None, None, None)
    dist.barrier()
    return sets if first else build(run, False)


def _wanted(run: Run) -> tuple[int, int, int]:
    train = run.settings.train
    steps = train.train_iters or 0
    evaluations = steps // train.eval_interval + 1
    batch = run.global_batch_size
    return (BatchSizes(run).consumed_after(steps), evaluations * train.eval_iters * batch, train.eval_iters * batch)


def _sources(run: Run) -> dict[str, Any]:
    data = run.settings.data
    return {"data_path": data.data_path, "split": data.split, "train_data_path": data.train_data_path,
            "valid_data_path": data.valid_data_path, "test_data_path": data.test_data_path,
            "vocab_size": run.model.vocab_size, "seq_length": run.seq_length, "seed": run.settings.train.seed,
            "cache_dir": Path(data.data_cache_path) if data.data_cache_path else None}


def _text_sets(run: Run, build: bool) -> Sets:
    return build_datasets(**_sources(run), mock=run.settings.data.mock_data, num_samples=_wanted(run), build=build)


def _pair_sets(run: Run, build: bool) -> Sets:
    return build_pair_datasets(**_sources(run), num_samples=_wanted(run), build=build)


def _instruction_sets(run: Run, build: bool) -> Sets:
    sources = _sources(run)
    wanted = _wanted(run)
    if not run.settings.data.pack:
        return build_instruction_datasets(**sources, num_samples=wanted, build=build)
    # rows are bins of one epoch of samples, visited in a new order every epoch
    opened = open_streams(sources["data_path"], [sources[f"{name}_data_path"] for name in ("train", "valid", "test")])
    epoch = sum(len(streams) for streams in opened.values())
    train, valid, test = (epoch if count else 0 for count in wanted)
    sets = build_instruction_datasets(**sources, num_samples=(train, valid, test), build=build)
    packed: list[PackedDataset | None] = []
    for samples in sets:
        if samples is None:
            packed.append(None)
            continue
        order, starts = dataset_bins(samples, run.seq_length, sources["seed"], sources["cache_dir"], build)
        packed.append(PackedDataset(samples, order, starts, sources["seed"]))
    return packed[0], packed[1], packed[2]
