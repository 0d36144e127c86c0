"""Which passes give the likelihood of continuations: a tree of all tokens, in which a shared beginning stands once.

A context and its continuation without the last token are one path of the tree. The path of a large subtree is stored
in the cache; small subtrees that hang on it are computed whole, several in one pass, each token seeing its own path
only (a mask), and are not stored.

Import this module only after the device was chosen (`modellink.start`): it needs megatron-core's process groups.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modellink.device.copies import queued_copy
from modellink.inference.cache import KVCache, Piece, shared_length
from modellink.inference.replica import Replica
from modellink.inference.request import Score

HEAD_SLICE = 256  # positions whose logits are held at once
ROW = 0  # of the cache: the only one that scoring needs


@dataclass(eq=False)
class Node:
    """Tokens that follow each other without a branch: `path[start:end]` behind the node's parents.

    Attributes:
        size: tokens of the node and all below it.
        asked: position -> tokens whose likelihood behind it is asked for, and where the answers go (pair, place).
    """

    path: tuple[int, ...]
    start: int
    end: int
    parent: "Node | None" = None
    children: list["Node"] = field(default_factory=list)
    size: int = 0
    asked: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Want:
    """A place in a pass behind which tokens are judged.

    Attributes:
        place: among the packed tokens.
        targets: the tokens.
        answers: (pair, place in its continuation) of each.
    """

    place: int
    targets: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]


class Scoring:
    """The likelihoods of some pairs of context and continuation, as they come in.

    Args:
        is_shared: compute what pairs share once; otherwise each pair is a branch of its own.
    """

    def __init__(self, pairs: Sequence[tuple[list[int], list[int]]], is_shared: bool = True):
        self._is_shared = is_shared
        self._logprobs = [[0.0] * len(continuation) for _, continuation in pairs]
        self._is_greedy = [[False] * len(continuation) for _, continuation in pairs]
        paths = [tuple([*context, *continuation][:-1]) if continuation else () for context, continuation in pairs]
        self._root, leaves = _grow([path for path in paths if path], is_shared)
        leaf_of = iter(leaves)
        for pair, ((context, continuation), path) in enumerate(zip(pairs, paths)):
            if not path:
                continue
            node = next(leaf_of)
            for place in reversed(range(len(continuation))):
                position = len(context) - 1 + place
                while position < node.start:
                    assert node.parent is not None
                    node = node.parent
                node.asked.setdefault(position, []).append((continuation[place], pair, place))

    def passes(self, cache: KVCache, budget: int) -> Iterator[tuple[list[Piece], list[Want]]]:
        """The passes to run, in order: each over at most `budget` tokens (a subtree is never above it)."""
        yield from self._visit(self._root, cache, budget)

    def take(self, wants: Sequence[Want], results: Tensor) -> None:
        """Results [targets of all wants, 2]: log-probability, 1 for the most likely token."""
        answers = [answer for want in wants for answer in want.answers]
        for (pair, place), (logprob, is_best) in zip(answers, results.tolist(), strict=True):
            self._logprobs[pair][place] = logprob
            self._is_greedy[pair][place] = bool(is_best)

    def scores(self) -> list[Score]:
        """What was taken, in the order of the pairs."""
        return [Score(logprobs, is_greedy) for logprobs, is_greedy in zip(self._logprobs, self._is_greedy)]

    def _visit(self, node: Node, cache: KVCache, budget: int) -> Iterator[tuple[list[Piece], list[Want]]]:
        yield from self._store(node, cache, budget)
        batch: list[Node] = []
        large = []
        for child in node.children:
            if child.size > budget or self._is_held(child, cache):
                large.append(child)
                continue
            if sum(other.size for other in batch) + child.size > budget:
                yield _pack(batch)
                batch = []
            batch.append(child)
        for child in large:  # first: what the row holds of an earlier call is lost with the next pass
            yield from self._visit(child, cache, budget)
        if batch:
            yield _pack(batch)

    def _is_held(self, node: Node, cache: KVCache) -> bool:
        held = cache.tokens[ROW]
        return (self._is_shared and bool(node.children) and len(held) >= node.end
                and held[:node.end] == list(node.path[:node.end]))

    def _store(self, node: Node, cache: KVCache, budget: int) -> Iterator[tuple[list[Piece], list[Want]]]:
        """Bring the node's tokens into the cache, behind those of its parents."""
        first = node.start
        if self._is_shared:  # the row may hold them; where something is asked they are computed again
            held = shared_length(cache.tokens[ROW], node.path[:node.end])
            first = max(first, min(held, min(node.asked, default=node.end)))
        for start in range(first, node.end, budget):
            end = min(start + budget, node.end)
            wants = [_want(position - start, asked) for position, asked in sorted(node.asked.items())
                     if start <= position < end]
            yield [Piece(ROW, start, node.path[start:end])], wants


def _grow(paths: Sequence[tuple[int, ...]], is_shared: bool) -> tuple[Node, list[Node]]:
    """The tree of some paths, and for each path the node where it ends."""
    root = Node((), 0, 0)
    if not is_shared:
        root.children = [Node(path, 0, len(path), root, size=len(path)) for path in paths]
        return root, root.children
    ends: dict[tuple[int, ...], Node] = {}
    branch, before = [root], ()  # type: list[Node], tuple[int, ...]
    for path in sorted({*paths}):
        shared = shared_length(before, path)
        below = None
        while branch[-1].end > shared:
            below = branch.pop()
        top = branch[-1]
        if top.end < shared:  # the shared part ends inside `below`: it becomes two nodes
            assert below is not None
            middle = Node(path, top.end, shared, top, [below])
            top.children[-1], below.parent, below.start = middle, middle, shared
            branch.append(middle)
            top = middle
        leaf = Node(path, shared, len(path), top)
        top.children.append(leaf)
        branch.append(leaf)
        ends[path], before = leaf, path
    for node in reversed(list(_below(root))):
        node.size = node.end - node.start + sum(child.size for child in node.children)
    return root, [ends[path] for path in paths]


def _below(node: Node) -> Iterator[Node]:
    """The node and all below it, parents before children, a subtree in one run."""
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(node.children))


def _want(place: int, asked: Sequence[tuple[int, int, int]]) -> Want:
    return Want(place, tuple(token for token, _, _ in asked), tuple((pair, place) for _, pair, place in asked))


def _pack(subtrees: Sequence[Node]) -> tuple[list[Piece], list[Want]]:
    """One pass over whole subtrees that hang on what the row holds."""
    pieces: list[Piece] = []
    wants: list[Want] = []
    packed = 0
    for top in subtrees:
        tokens: list[int] = []
        offsets: list[int] = []
        first_of: dict[Node, int] = {}
        mask = torch.zeros(top.size, top.size, dtype=torch.bool)
        for node in _below(top):
            first, count = len(tokens), node.end - node.start
            first_of[node] = first
            if node is not top:
                assert node.parent is not None
                seen = mask[first_of[node.parent] + node.parent.end - node.parent.start - 1]
                mask[first:first + count] = seen  # what the end of its parent sees
            mask[first:first + count, first:first + count] = torch.ones(count, count, dtype=torch.bool).tril()
            tokens += node.path[node.start:node.end]
            offsets += range(node.start - top.start, node.end - top.start)
            wants += [_want(packed + first + position - node.start, asked)
                      for position, asked in sorted(node.asked.items())]
        is_branched = bool(top.children) and len(first_of) > 1
        pieces.append(Piece(ROW, top.start, tokens, False, offsets if is_branched else None,
                            mask if is_branched else None))
        packed += len(tokens)
    return pieces, wants


def score(replica: Replica, pairs: Sequence[tuple[list[int], list[int]]], budget: int) -> list[Score]:
    """Scores of pairs, by passes of at most `budget` tokens."""
    if not pairs:
        return []
    scoring = Scoring(pairs, replica.prefix_reuse)
    cache = replica.reserve(1, row_length(pairs, budget))
    for pieces, wants in scoring.passes(cache, budget):
        hidden = replica.run(cache, pieces, [want.place for want in wants])
        scoring.take(wants, replica.agree(_likelihoods(replica, hidden, wants)))
    return scoring.scores()


def row_length(pairs: Sequence[tuple[list[int], list[int]]], budget: int) -> int:
    """Tokens of the row: the longest pair, and behind it the branches that one pass computes."""
    lengths = [len(context) + len(continuation) for context, continuation in pairs]
    return max(lengths) + min(budget, sum(lengths))


def _likelihoods(replica: Replica, hidden: Tensor | None, wants: Sequence[Want]) -> Tensor:
    """[targets of all wants, 2]: log-probability, whether it is the most likely token."""
    told = torch.zeros(sum(len(want.targets) for want in wants), 2)
    if hidden is None:
        return told
    first = 0
    for start in range(0, len(wants), HEAD_SLICE):
        some = wants[start:start + HEAD_SLICE]
        logits = replica.logits(hidden[start:start + HEAD_SLICE])
        if not replica.is_chooser:
            continue
        rows, tokens = (queued_copy(torch.tensor(numbers), logits.device) for numbers in (
            [row for row, want in enumerate(some) for _ in want.targets],
            [token for want in some for token in want.targets]))
        likely = logits[rows, tokens] - logits.logsumexp(-1)[rows]
        is_best = logits.argmax(-1)[rows] == tokens
        told[first:first + len(tokens)] = torch.stack((likely, is_best.float()), dim=1).cpu()
        first += len(tokens)
    return told
