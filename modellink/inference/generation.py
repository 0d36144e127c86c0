"""The loops of generation: requests share steps, join late and leave early; beam searches move rows of the cache.

Import this module only after the device was chosen (`modellink.start`): it needs megatron-core's process groups.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from modellink.inference.beams import BeamSearch, Proposal
from modellink.inference.cache import KVCache, Piece, shared_length
from modellink.inference.interrupt import Interrupt
from modellink.inference.memory import row_length
from modellink.inference.replica import Replica
from modellink.inference.request import Answer, Finish, NextToken, Request
from modellink.inference.sampling import Sampler, draw_together, is_plain

WORTH_WAITING = 8  # tokens in common for which a prompt waits until another one is read


class _Running:
    """A request on its way: the tokens of one row of the cache."""

    def __init__(self, index: int, request: Request):
        self.index = index
        self.request = request
        self.sampler = Sampler(request.sampling)
        self.watch = request.watch() if request.watch else None
        self.tokens: list[int] = []
        self.finish: Finish = ""

    def add(self, token: int, logprob: float) -> NextToken:
        settings = self.request.sampling
        self.tokens.append(token)
        is_seen = self.watch is not None and self.watch.add(token)
        self.finish = "stop" if is_seen else settings.ends(token, len(self.tokens))
        return NextToken(self.index, token, logprob if settings.logprobs else None, self.finish)


class Generation:
    """Generates with one replica.

    Args:
        num_rows: rows of the cache, at least the beams of the widest request.
        chunk: most tokens of prompts in one pass.
    """

    def __init__(self, replica: Replica, num_rows: int, chunk: int, is_interruptible: bool):
        self._replica = replica
        self._num_rows = num_rows
        self._chunk = chunk
        self._is_interruptible = is_interruptible

    def stream(self, requests: Sequence[Request]) -> Iterator[NextToken]:
        """Next tokens of requests without beams."""
        if not requests:
            return
        num_rows = self._num_rows
        cache = self._replica.reserve(num_rows, max(map(row_length, requests)))
        waiting = deque(_Running(index, request) for index, request in enumerate(requests))
        active: list[_Running] = []  # in the order of their rows
        with Interrupt(self._is_interruptible) as interrupt:
            while waiting or active:
                if waiting and len(active) < num_rows:
                    stepping = self._admit(cache, waiting, len(active), num_rows)
                    hidden = self._read_prompts(cache, [answer.request.prompt_ids for answer in stepping], len(active))
                    active += stepping
                else:
                    stepping = active
                    hidden = self._replica.run(cache, [Piece(row, len(cache.tokens[row]), answer.tokens[-1:])
                                                for row, answer in enumerate(active)], [*range(len(active))])
                chosen, is_interrupted = self._choose(hidden, stepping, interrupt)
                for answer, (token, logprob) in zip(stepping, chosen, strict=True):
                    item = answer.add(token, logprob)
                    if is_interrupted and not item.finish:
                        answer.finish = "interrupted"
                        item = NextToken(item.index, item.token, item.logprob, "interrupted")
                    yield item
                if is_interrupted:
                    for answer in (*active, *waiting):
                        if not answer.finish:
                            yield NextToken(answer.index, None, None, "interrupted")
                    return
                for row in reversed(range(len(active))):
                    if active[row].finish:
                        last = len(active) - 1
                        cache.copy(last, row, len(cache.tokens[last]))
                        active[row] = active[last]
                        active.pop()

    def _admit(self, cache: KVCache, waiting: deque[_Running], first_row: int, num_rows: int) -> list[_Running]:
        """Take requests whose prompts are read in the next pass; their rows hold what they share with others."""
        taken: list[_Running] = []
        size = 0
        while waiting and first_row + len(taken) < num_rows:
            prompt, row = waiting[0].request.prompt_ids, first_row + len(taken)
            donor, shared = row, 0
            if self._replica.prefix_reuse:
                donor, shared = cache.best_donor(prompt, without=range(first_row, row))
            shared = min(shared, len(prompt) - 1)  # the last token is read for its logits
            if self._replica.prefix_reuse and taken:
                other = max(min(shared_length(prompt, answer.request.prompt_ids), len(prompt) - 1) for answer in taken)
                if other >= shared + WORTH_WAITING or other == len(prompt) - 1 > shared:
                    break
            if taken and size + len(prompt) - shared > self._chunk:
                break
            size += len(prompt) - shared
            cache.copy(donor, row, shared)
            taken.append(waiting.popleft())
        return taken

    def _read_prompts(self, cache: KVCache, prompts: Sequence[list[int]], first_row: int) -> Tensor | None:
        """Read the rest of each prompt into the rows from `first_row` on; hidden states of their last tokens."""
        rows = [(row, prompt) for row, prompt in enumerate(prompts, first_row)]
        if len(rows) > 1:  # chosen to fit in one pass
            pieces = [Piece(row, len(cache.tokens[row]), prompt[len(cache.tokens[row]):]) for row, prompt in rows]
            ends = [-1]
            for piece in pieces:
                ends.append(ends[-1] + len(piece.tokens))
            return self._replica.run(cache, pieces, ends[1:])
        (row, prompt), hidden = rows[0], None
        for start in range(len(cache.tokens[row]), len(prompt), self._chunk):
            part = prompt[start:start + self._chunk]
            hidden = self._replica.run(cache, [Piece(row, start, part)], [len(part) - 1])
        return hidden

    def _choose(self, hidden: Tensor | None, answers: Sequence[_Running], interrupt: Interrupt
                ) -> tuple[list[tuple[int, float]], bool]:
        """The next token of each answer and its log-probability, and whether this is the last step."""
        told = torch.zeros(len(answers) + 1, 2)
        if hidden is not None:
            logits = self._replica.logits(hidden)
            if self._replica.is_chooser:
                told[:-1] = _choose_tokens(logits, answers)
        if self._replica.is_first:
            told[-1] = float(interrupt.is_asked)
        told = self._replica.agree(told)
        return [(int(token), logprob) for token, logprob in told[:-1].tolist()], bool(told[-1, 0])

    def search(self, requests: Sequence[Request], is_over: bool) -> list[Answer]:
        """Beam searches, as many at a time as there are rows for; the beams of one have neighbouring rows.

        Args:
            is_over: Ctrl-C came before they could start.
        """
        if not requests:
            return []
        num_rows = self._num_rows
        cache = self._replica.reserve(num_rows, max(map(row_length, requests)))
        searches = [BeamSearch(request) for request in requests]
        waiting, active = deque(searches), list[BeamSearch]()
        for search in searches if is_over else ():
            search.interrupt()
        with Interrupt(self._is_interruptible) as interrupt:
            while (waiting or active) and not is_over:
                first = sum(search.num_beams for search in active)
                if waiting and first + waiting[0].num_beams <= num_rows:
                    search = waiting.popleft()
                    hidden = self._read_beam_prompt(cache, search, first)
                    active.append(search)
                    stepping = [search]
                else:
                    tokens = [token for search in active for token in search.last_tokens]
                    hidden = self._replica.run(cache, [Piece(row, len(cache.tokens[row]), [token])
                                                for row, token in enumerate(tokens)], [*range(len(tokens))])
                    stepping, first = active, 0
                sources = list(range(first))
                proposals, is_over = self._propose(hidden, stepping, interrupt)
                for search, proposed in zip(stepping, proposals, strict=True):
                    parents = search.take(proposed)
                    if not search.is_done:
                        sources += [first + parent for parent in parents]
                    first += search.num_beams
                if is_over:
                    for search in (*active, *waiting):
                        search.interrupt()
                is_any_done = any(search.is_done for search in active)
                # beams of one search share its prompt; rows that close up behind an ended one share nothing
                cache.arrange(sources, 0 if is_any_done else min(len(search.request.prompt_ids) for search in active))
                active = [search for search in active if not search.is_done]
        return [search.answer() for search in searches]

    def _read_beam_prompt(self, cache: KVCache, search: BeamSearch, first_row: int) -> Tensor | None:
        """Read the prompt into one row, give every beam a copy; one hidden state a beam."""
        prompt = search.request.prompt_ids
        donor, shared = cache.best_donor(prompt) if self._replica.prefix_reuse else (first_row, 0)
        cache.copy(donor, first_row, min(shared, len(prompt) - 1))
        hidden = self._read_prompts(cache, [prompt], first_row)
        for row in range(first_row + 1, first_row + search.num_beams):
            cache.copy(first_row, row, len(prompt))
        return None if hidden is None else hidden.expand(search.num_beams, -1)

    def _propose(self, hidden: Tensor | None, searches: Sequence[BeamSearch], interrupt: Interrupt
                 ) -> tuple[list[list[Proposal]], bool]:
        """What the chooser proposes to each search, and whether this is the last step."""
        counts = [search.num_proposals for search in searches]
        told = torch.zeros(sum(counts) + 1, 4)
        if hidden is not None:
            logits = self._replica.logits(hidden)
            if self._replica.is_chooser:
                parts = logits.split([search.num_beams for search in searches])
                told[:-1] = torch.cat([search.propose(part) for search, part in zip(searches, parts)])
        if self._replica.is_first:
            told[-1] = float(interrupt.is_asked)
        told = self._replica.agree(told)
        parts = told[:-1].split(counts)
        return [[Proposal(score, logprob, int(token), int(parent)) for score, logprob, token, parent in part.tolist()]
                for part in parts], bool(told[-1, 0])


def _choose_tokens(logits: Tensor, answers: Sequence[_Running]) -> Tensor:
    """[answers, 2]: token, log-probability (0 where nobody asks)."""
    chosen = logits.argmax(-1)
    # the device computes the logits meanwhile
    draw_together([answer.sampler for answer in answers if not answer.request.sampling.greedy], logits.shape[1])
    for row, answer in enumerate(answers):
        settings = answer.request.sampling
        if not (settings.greedy and is_plain(settings, len(answer.tokens))):
            chosen[row] = answer.sampler.choose(logits[row], answer.request.prompt_ids, answer.tokens)
    logprobs = torch.zeros(len(answers), device=logits.device)
    if any(answer.request.sampling.logprobs for answer in answers):
        logprobs = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(-1)
    return torch.stack((chosen.float(), logprobs), dim=1).cpu()
