"""Generates tokens for requests, many in one batch, in tensor and pipeline parallel.

Import this module only after the device was chosen (`modellink.start`): it needs megatron-core's process groups.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from modellink.inference.cache import KVCache
from modellink.inference.request import Request
from modellink.inference.sampling import Sampler
from modellink.models.gpt import QwenModel
from modellink.models.run import Run


class _Answer:
    """A request on its way: the tokens of one row of the cache."""

    def __init__(self, index: int, request: Request):
        self.index = index
        self.request = request
        self.sampler = Sampler(request.sampling)
        self.last_token = -1
        self.num_tokens = 0

    def add(self, token: int) -> tuple[int, int]:
        self.last_token = token
        self.num_tokens += 1
        return self.index, token

    @property
    def is_done(self) -> bool:
        return self.request.sampling.ends(self.last_token, self.num_tokens)


class Engine:
    """The model of one replica and the loop around it.

    Every prompt is read by itself into its own row of the KV cache; then all rows take one step at a time together,
    each attending over its own tokens. A finished row makes room for the next request, so a request's tokens do not
    depend on its batch. All ranks run the same calls and get the same tokens.

    Args:
        chunks: the model chunks of this rank with weights loaded; generation runs one a stage, without sequence
            parallelism.
        run: the run the chunks were built for.
        device: of this rank.
        max_batch_size: requests in one step; more wait.
        prefill_chunk_size: tokens of a prompt that are read in one pass, a bound on the memory of activations.
    """

    def __init__(self, chunks: Sequence[QwenModel], run: Run, device: torch.device, *, max_batch_size: int = 32,
                 prefill_chunk_size: int = 2048):
        dims = run.dims
        if len(chunks) != 1 or dims.data != 1 or dims.sequence_parallel:
            raise ValueError(f"generation runs one replica, one chunk a stage, no sequence parallelism, not {dims}")
        self.model = chunks[0].eval()
        self.run = run
        self.device = device
        self.max_sequence_length = run.seq_length
        self.max_batch_size = max_batch_size
        self.prefill_chunk_size = prefill_chunk_size
        self._rank = dist.get_rank()
        self._chooser = dims.world_size - dims.tensor  # first rank of the last stage: it samples for all

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, int]]:
        """Generate; every rank must read the stream to its end.

        Yields:
            (index of the request, next token of its answer), the tokens of different requests interleaved. An answer
            ends with a stop token or its max_new_tokens-th token.

        Raises:
            ValueError: a prompt is empty, has an id outside the vocabulary, or does not fit with its answer.
        """
        for index, request in enumerate(requests):
            self._check(index, request)
        return self._stream(requests)

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """The whole answers."""
        answers: list[list[int]] = [[] for _ in requests]
        for index, token in self.stream(requests):
            answers[index].append(token)
        return answers

    def _check(self, index: int, request: Request) -> None:
        prompt, limit = request.prompt_ids, self.max_sequence_length
        if not prompt:
            raise ValueError(f"request {index}: the prompt is empty")
        if min(prompt) < 0 or max(prompt) >= self.run.model.vocab_size:
            raise ValueError(f"request {index}: token ids must be in 0..{self.run.model.vocab_size - 1}")
        if len(prompt) + request.sampling.max_new_tokens > limit:
            raise ValueError(f"request {index}: {len(prompt)} prompt tokens and {request.sampling.max_new_tokens} new "
                             f"ones do not fit in {limit}")

    def _stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, int]]:
        if not requests:
            return
        num_rows = min(len(requests), self.max_batch_size)
        # the last token of an answer is never read
        longest = max(len(request.prompt_ids) + request.sampling.max_new_tokens - 1 for request in requests)
        cache = KVCache.for_model(self.model, num_rows, longest)
        waiting = deque(_Answer(index, request) for index, request in enumerate(requests))
        active: list[_Answer] = []  # in the order of their rows
        while waiting or active:
            if waiting and len(active) < num_rows:
                answer = waiting.popleft()
                active.append(answer)
                logits = self._read_prompt(cache, len(active) - 1, answer.request.prompt_ids)
                yield answer.add(self._choose(logits, [answer])[0])
            else:
                logits = self._forward(cache, 0, torch.tensor([[answer.last_token] for answer in active]))
                for answer, token in zip(active, self._choose(logits, active)):
                    yield answer.add(token)
            for row in reversed(range(len(active))):
                if active[row].is_done:
                    cache.remove(row, len(active) - 1)
                    active[row] = active[-1]
                    active.pop()

    def _read_prompt(self, cache: KVCache, row: int, prompt: list[int]) -> Tensor | None:
        logits = None
        for start in range(0, len(prompt), self.prefill_chunk_size):
            logits = self._forward(cache, row, torch.tensor([prompt[start:start + self.prefill_chunk_size]]))
        return logits

    @torch.inference_mode()
    def _forward(self, cache: KVCache, first_row: int, tokens: Tensor) -> Tensor | None:
        """One pass through all stages.

        Args:
            tokens: [rows, s], the next tokens of the rows from `first_row` on.

        Returns:
            Logits of the last token on the last stage, [rows, vocabulary] fp32 without the padding rows of the
            vocabulary; None on other stages.
        """
        num_rows, num_tokens = tokens.shape
        cache.begin(first_row, num_rows, num_tokens)
        tensor, group = self.run.dims.tensor, parallel_state.get_pipeline_model_parallel_group()
        if not self.model.pre_process:
            config = self.model.config
            hidden = torch.empty(num_tokens, num_rows, config.hidden_size, dtype=config.params_dtype,
                                 device=self.device)
            dist.recv(hidden, self._rank - tensor, group)  # ranks of one stage are neighbours
            self.model.set_input_tensor(hidden)
        out = self.model(tokens.to(self.device), None, None, inference_context=cache, runtime_gather_output=True)
        cache.advance()
        if self.model.post_process:
            return out[:, -1, :self.model.real_vocab_size].float()
        dist.send(out.contiguous(), self._rank + tensor, group)
        return None

    def _choose(self, logits: Tensor | None, answers: list[_Answer]) -> list[int]:
        """The next token of each answer, chosen on one rank and told to all."""
        tokens = torch.empty(len(answers), dtype=torch.int64, device=self.device)
        if self._rank == self._chooser:
            assert logits is not None
            tokens.copy_(torch.tensor([answer.sampler.choose(row) for answer, row in zip(answers, logits)]))
        if dist.get_world_size() > 1:
            dist.broadcast(tokens, self._chooser)
        chosen: list[int] = tokens.tolist()
        return chosen
