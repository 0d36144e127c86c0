"""Generates tokens for requests and scores given ones, many in one batch, in tensor, pipeline and data parallel.

Import this module only after the device was chosen (`modellink.start`): it needs megatron-core's process groups.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from modellink.config.errors import ConfigError
from modellink.inference import scoring
from modellink.inference.generation import Generation
from modellink.inference.memory import most_rows, row_length, rows_that_fit
from modellink.inference.replica import Replica
from modellink.inference.request import Answer, NextToken, Request, Score
from modellink.inference.steps import Recorder
from modellink.models.gpt import QwenModel
from modellink.models.run import Run

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Engine:
    """The model of one replica and the loop around it.

    Each request has its own row of the KV cache. Prompts are packed into passes of `prefill_chunk_size` tokens, without
    padding; what a prompt shares with the beginning of a row (of this call or an earlier one) is copied instead of
    computed. All rows then take one step at a time together, each attending over its own tokens; a finished row makes
    room for the next request, so a request's tokens do not depend on its batch. All ranks run the same calls with the
    same requests and get the same results.

    With data parallel replicas `generate` and `score` give each replica a part of the work.

    Args:
        chunks: the model chunks of this rank with weights loaded; generation runs one a stage, without sequence
            parallelism. The engine takes the weights of their linear layers: nothing else can use them afterwards.
        run: the run the chunks were built for.
        device: of this rank.
        max_batch_size: rows in one step; more requests wait.
        prefill_chunk_size: tokens that are read in one pass, a bound on the memory of activations.
        max_kv_cache_bytes: bound on the cache of this rank: fewer rows run at once. None: no bound.
        kv_cache_dtype: "auto" is the model's, "int8" one byte and a scale for each token and head.
        prefix_reuse: compute what prompts share once.
        is_interruptible: SIGINT ends the running generation only.
        recorder: makes what records the steps of generation, to launch them again as a whole; for one rank and no
            adapters.

    One call at a time: a stream that is not read to its end yet holds rows of the cache.

    Attributes:
        replica: this rank's model and cache; `replica.num_computed` counts tokens that went through the model.
    """

    def __init__(self, chunks: Sequence[QwenModel], run: Run, device: torch.device, *, max_batch_size: int = 32,
                 prefill_chunk_size: int = 2048, max_kv_cache_bytes: int | None = None, kv_cache_dtype: str = "auto",
                 prefix_reuse: bool = True, is_interruptible: bool = True, recorder: Recorder | None = None):
        dims = run.dims
        if len(chunks) != 1 or dims.sequence_parallel:
            raise ValueError(f"generation runs one chunk a stage, no sequence parallelism, not {dims}")
        self.model = chunks[0].eval()
        self.run = run
        self.device = device
        self.max_sequence_length = run.seq_length
        self.max_batch_size = max_batch_size
        self.prefill_chunk_size = prefill_chunk_size
        self.is_interruptible = is_interruptible
        self.replica = Replica(self.model, run, device, is_int8=kv_cache_dtype == "int8",
                               max_kv_cache_bytes=max_kv_cache_bytes, prefix_reuse=prefix_reuse, recorder=recorder)

    def stream(self, requests: Sequence[Request]) -> Iterator[NextToken]:
        """Generate; every rank must read the stream to its end.

        Yields:
            Next tokens, those of different requests interleaved; the last one of each request says why it ended.

        Raises:
            ValueError: a prompt is empty, has an id outside the vocabulary, or does not fit with its answer; beams.
            ConfigError: the KV cache of the longest request does not fit; data parallel replicas.
        """
        if self.run.dims.data > 1:
            raise ConfigError(f"a stream comes from one replica, but {self.run.dims.data} were started: start "
                              f"{self.run.dims.tensor * self.run.dims.pipeline} ranks, or ask for whole answers.")
        if most_rows(requests) > 1:
            raise ValueError("a beam search has no stream: its answer is known at the end")
        self._check(requests)
        return self._generation(requests).stream(requests)

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """The whole answers, on every rank in the order of the requests; errors as for `stream`."""
        self._check(requests)
        return self._over_replicas(requests, self._generate)

    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        """How likely continuations are: pairs of a context of at least one token and a continuation.

        What contexts share, and the context of several continuations, is computed once; continuations of one token
        need no pass of their own. Give many pairs in one call: they are sorted and batched here.

        Raises:
            ValueError: an empty context, an id outside the vocabulary, or a pair that does not fit.
            ConfigError: the KV cache of the longest pair does not fit.
        """
        for index, (context, continuation) in enumerate(pairs):
            self._check_ids(f"pair {index}", context, continuation)
        if not pairs:
            return []
        rows_that_fit(1, scoring.row_length(pairs, self.prefill_chunk_size), self.replica.token_bytes,
                      self.replica.max_kv_cache_bytes)
        order = sorted(range(len(pairs)), key=lambda index: pairs[index][0])  # neighbours share most
        scores = self._over_replicas([pairs[index] for index in order], lambda part: scoring.score(
            self.replica, part, self.prefill_chunk_size))
        placed = dict(zip(order, scores, strict=True))
        return [placed[index] for index in range(len(pairs))]

    def _over_replicas(self, items: Sequence[_Item], work: Callable[[Sequence[_Item]], list[_Result]]
                       ) -> list[_Result]:
        """Each replica works on neighbouring items; all ranks get all results in order."""
        replicas = self.run.dims.data
        if replicas == 1:
            return work(items)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)  # as training uses
        rank = dist.get_rank(group)
        borders = [len(items) * part // replicas for part in range(replicas + 1)]
        parts: list[list[_Result]] = [[]] * replicas
        dist.all_gather_object(parts, work(items[borders[rank]:borders[rank + 1]]), group=group)
        return [result for part in parts for result in part]

    def _check(self, requests: Sequence[Request]) -> None:
        for index, request in enumerate(requests):
            self._check_ids(f"request {index}", request.prompt_ids, [])
            if len(request.prompt_ids) + request.sampling.max_new_tokens > self.max_sequence_length:
                raise ValueError(f"request {index}: {len(request.prompt_ids)} prompt tokens and "
                                 f"{request.sampling.max_new_tokens} new ones do not fit in {self.max_sequence_length}")
        if requests:
            self._fit_rows(requests)

    def _check_ids(self, name: str, prompt: Sequence[int], more: Sequence[int]) -> None:
        if not prompt:
            raise ValueError(f"{name}: the prompt is empty")
        ids = [*prompt, *more]
        if min(ids) < 0 or max(ids) >= self.run.model.vocab_size:
            raise ValueError(f"{name}: token ids must be in 0..{self.run.model.vocab_size - 1}")
        num_read = len(ids) - bool(more)  # the last token of a continuation is only judged
        if num_read > self.max_sequence_length:
            raise ValueError(f"{name}: {num_read} tokens do not fit in {self.max_sequence_length}")

    def _fit_rows(self, requests: Sequence[Request]) -> int:
        wanted = min(sum(request.sampling.num_beams for request in requests), self.max_batch_size)
        return rows_that_fit(wanted, max(map(row_length, requests)), self.replica.token_bytes,
                             self.replica.max_kv_cache_bytes, most_rows(requests))

    def _generation(self, requests: Sequence[Request]) -> Generation:
        return Generation(self.replica, self._fit_rows(requests) if requests else 1, self.prefill_chunk_size,
                          self.is_interruptible)

    def _generate(self, requests: Sequence[Request]) -> list[Answer]:
        generation = self._generation(requests)
        answers: dict[int, Answer] = {}
        items: dict[int, list[NextToken]] = {
            index: [] for index, request in enumerate(requests) if request.sampling.num_beams == 1}
        places = list(items)
        for item in generation.stream([requests[index] for index in places]):
            items[places[item.index]].append(item)
        for index, found in items.items():
            answers[index] = Answer([item.token for item in found if item.token is not None],
                                    [item.logprob for item in found if item.logprob is not None]
                                    if requests[index].sampling.logprobs else None, found[-1].finish)
        is_over = any(answer.finish == "interrupted" for answer in answers.values())
        beams = [index for index in range(len(requests)) if index not in items]
        answers.update(zip(beams, generation.search([requests[index] for index in beams], is_over)))
        return [answers[index] for index in range(len(requests))]
