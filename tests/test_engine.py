"""The engine against transformers in every layout: greedy, beams, samples, likelihoods, prefix reuse, cache, Ctrl-C."""

from pathlib import Path
from typing import Any

import pytest
import torch
from group_worker import with_collectives, with_messages
from inference_cases import (
    BEAMS,
    HALVES,
    HEADER,
    LAYOUTS,
    MODELS,
    NUM_NEW,
    PAIRS,
    PROMPTS,
    ROWS,
    SAMPLED,
    SEEN,
    SHARING,
    STOPS,
    WORDS,
    Results,
    make_place,
)
from transformers import Qwen2ForCausalLM

from modellink.inference.cache import KVCache, Piece
from modellink.inference.request import Score

CASES = [(world, f"TP{tensor} PP{pipeline}", name) for world, layouts in LAYOUTS.items()
         for tensor, pipeline in layouts for name in MODELS]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def results(place: Path) -> Results:
    return Results(place)


@pytest.fixture(scope="module")
def models(place: Path) -> dict[str, Any]:
    return {name: Qwen2ForCausalLM.from_pretrained(place / name) for name in MODELS}


def by_transformers(model: Any, prompt: list[int], **options: Any) -> tuple[list[int], float | None]:
    """(answer, score of a beam search) of a prompt alone; an answer ends with its first stop token."""
    values = {"max_new_tokens": NUM_NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "top_k": 0,
              **options}
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), output_scores=True, return_dict_in_generate=True,
                         **values)
    tokens = out.sequences[0, len(prompt):].tolist()
    for place, token in enumerate(tokens):
        if token in (values["eos_token_id"] or []):
            tokens = tokens[:place + 1]
            break
    return tokens, out.sequences_scores.item() if values.get("num_beams", 1) > 1 else None


@pytest.fixture(scope="module")
def expected(models: dict[str, Any]) -> dict[str, list[list[int]]]:
    """Greedy tokens of transformers, each prompt alone."""
    return {name: [by_transformers(model, prompt)[0] for prompt in PROMPTS] for name, model in models.items()}


def wanted_scores(model: Any) -> list[Score]:
    """Likelihoods by a forward pass of transformers over each pair alone."""
    found = []
    for context, continuation in PAIRS:
        ids = torch.tensor([[*context, *continuation]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, len(context) - 1:-1].log_softmax(-1)
        target = ids[0, len(context):]
        found.append(Score(logprobs.gather(1, target[:, None])[:, 0].tolist(),
                           (logprobs.argmax(-1) == target).tolist()))
    return found


def assert_same_scores(got: list[Score], want: list[Score]) -> None:
    assert [score.is_greedy for score in got] == [score.is_greedy for score in want]
    for mine, theirs in zip(got, want, strict=True):
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


@pytest.mark.parametrize("world, layout, name", CASES)
class TestLayouts:
    """Each layout, from a checkpoint of TP2 PP2 VPP2, against transformers in one process."""

    def test_greedy_tokens_are_transformers(self, world: str, layout: str, name: str, results: Any,
                                            expected: Any) -> None:
        assert len({tuple(tokens) for tokens in expected[name]}) == len(PROMPTS)  # the prompts matter
        for rank in results[world]:
            seen = rank[layout, name]
            assert seen["single"] == seen["batched"] == seen["afterwards"] == expected[name]
            assert seen["without_cache"] == [tokens[:4] for tokens in expected[name]]

    def test_rows_that_end_early_wait_in_a_queue_or_are_read_in_parts(self, world: str, layout: str, name: str,
                                                                      results: Any, expected: Any) -> None:
        cut = [tokens[:NUM_NEW - index] for index, tokens in enumerate(expected[name])]
        for rank in results[world]:
            assert rank[layout, name]["uneven"] == cut
            assert rank[layout, name]["queued_and_chunked"] == cut

    def test_prompts_that_begin_alike(self, world: str, layout: str, name: str, results: Any, models: Any) -> None:
        want = [by_transformers(models[name], prompt)[0] for prompt in SHARING]
        for rank in results[world]:
            assert rank[layout, name]["sharing"] == rank[layout, name]["without_reuse"] == want

    def test_a_stop_token_ends_the_answer(self, world: str, layout: str, name: str, results: Any,
                                          expected: Any) -> None:
        answer = expected[name][0]
        for rank in results[world]:
            assert rank[layout, name]["stopped"] == answer[:answer.index(answer[3]) + 1]

    def test_beams_are_transformers(self, world: str, layout: str, name: str, results: Any, models: Any) -> None:
        want = [by_transformers(models[name], prompt, num_beams=3, length_penalty=-1.0, eos_token_id=STOPS)
                for prompt in PROMPTS]
        assert any(len(tokens) < NUM_NEW for tokens, _ in want)  # some end early
        for rank in results[world]:
            for answer, (tokens, score) in zip(rank[layout, name]["beams"], want, strict=True):
                assert answer.tokens == tokens and answer.score == pytest.approx(score, rel=1e-4)
                assert sum(answer.logprobs) * len(tokens) == pytest.approx(score, rel=1e-4)
                assert answer.finish == ("stop" if tokens[-1] in STOPS else "length")

    def test_likelihoods_are_transformers(self, world: str, layout: str, name: str, results: Any, models: Any) -> None:
        want = wanted_scores(models[name])
        for rank in results[world]:
            for case in ("scores", "scores_without_reuse", "scores_chunked"):
                assert_same_scores(rank[layout, name][case], want)

    def test_log_probabilities_are_those_of_the_model_itself(self, world: str, layout: str, name: str, results: Any,
                                                             models: Any) -> None:
        want = [by_transformers(models[name], prompt, repetition_penalty=1.5)[0] for prompt in PROMPTS]
        for rank in results[world]:
            for prompt, tokens, answer in zip(PROMPTS, want, rank[layout, name]["logprobs"], strict=True):
                assert answer.tokens == tokens and answer.finish == "length"
                with torch.no_grad():
                    plain = models[name](torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
                assert answer.logprobs == pytest.approx(plain[range(len(tokens)), tokens].tolist(), abs=1e-5)

    def test_ctrl_c_ends_a_generation_on_all_ranks_and_nothing_else(self, world: str, layout: str, name: str,
                                                                    results: Any, expected: Any) -> None:
        by_rank = [rank[layout, name]["interrupted"] for rank in results[world]]
        assert all(answers == by_rank[0] for answers in by_rank)
        for answer, greedy in zip(by_rank[0], expected[name], strict=True):
            # the wish of the third token is read with the fourth
            assert answer.finish == "interrupted" and answer.tokens == greedy[:4]

    def test_logits_with_the_cache_are_those_of_the_whole_sequence(self, world: str, layout: str, name: str,
                                                                   results: Any, models: Any) -> None:
        with torch.no_grad():
            whole = [models[name](torch.tensor([row])).logits[0] for row in ROWS]
        logits = results[world][-1][layout, name]["logits"]  # the last rank is on the last stage
        for got, places in zip(logits, SEEN, strict=True):
            want = torch.stack([whole[row][position] for row, position in places])
            assert got.shape == want.shape == (len(places), WORDS)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)

    def test_the_same_seed_samples_the_same_tokens(self, world: str, layout: str, name: str, results: Any,
                                                   expected: Any) -> None:
        one = results["1"][0]["TP1 PP1", name]["sampled"]
        assert all(got != greedy for got, greedy in zip(one, expected[name]))
        for rank in results[world]:
            assert rank[layout, name]["sampled"] == one
            assert rank[layout, name]["sampled_alone"] == one

    def test_padding_rows_are_never_chosen(self, world: str, layout: str, name: str, results: Any,
                                           expected: Any) -> None:
        if name == "tied":
            return  # its head is the embedding, which the case must not change
        for rank in results[world]:
            assert rank[layout, name]["raised_padding"] == expected[name][0]
            assert max(rank[layout, name]["raised_padding_sampled"]) < WORDS


def test_weights_from_a_hf_folder_and_in_their_own_dtype(results: Any, expected: Any) -> None:
    for name in MODELS:
        assert results["1"][0]["TP1 PP1", name]["from_hf"] == expected[name]
    assert results["1"][0]["TP1 PP1", "tied"]["own_dtype"] is torch.bfloat16


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("world, layout", [(world, layout) for world, layout, name in CASES if name == "untied"])
def test_half_precision_is_as_near_to_fp32_as_transformers(world: str, layout: str, dtype: str, results: Any,
                                                          place: Path) -> None:
    exact, peer = (Qwen2ForCausalLM.from_pretrained(place / "bf16_hf", dtype=kind)
                   for kind in (torch.float32, HALVES[dtype]))

    def at_seen(model: Any) -> torch.Tensor:
        with torch.no_grad():
            whole = [model(torch.tensor([row])).logits[0].float() for row in ROWS]
        return torch.stack([whole[row][position] for places in SEEN for row, position in places])

    want = at_seen(exact)
    errors = at_seen(peer) - want
    for rank in results[world]:
        assert rank[layout, "untied"][dtype]["dtype"] is HALVES[dtype]
    own = torch.cat(results[world][-1][layout, "untied"][dtype]["logits"]) - want
    assert 0 < own.square().mean() < 1.5 ** 2 * errors.square().mean()  # random roundings: equal but for chance
    assert own.abs().max() < 2 * errors.abs().max()
    # every token is a best one, as far as rounding tells
    margin = 4 * float(errors.abs().max())
    for prompt, tokens in zip(PROMPTS, results[world][0][layout, "untied"][dtype]["tokens"], strict=True):
        assert len(tokens) == NUM_NEW
        with torch.no_grad():
            logits = exact(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1:-1]
        assert (logits.amax(-1) - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]).max() <= margin


def test_flags_reach_the_engine(results: Any) -> None:
    assert results["1"][0]["TP1 PP1", "untied"]["flags"] == (1 << 29, False, 3, True)


@pytest.fixture(scope="module")
def alone(results: Any) -> dict[str, Any]:
    """Cases of one process with the untied model."""
    found: dict[str, Any] = results["1"][0]["alone", "untied"]
    return found


def test_beam_settings_are_transformers(alone: Any, models: Any) -> None:
    for case, answers in zip(BEAMS, alone["beams"], strict=True):
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            tokens, score = by_transformers(models["untied"], prompt, eos_token_id=STOPS, **case)
            assert answer.tokens == tokens, case
            assert answer.score == pytest.approx(score, abs=1e-4)


def test_samples_are_those_of_transformers_with_the_same_seed(alone: Any, models: Any) -> None:
    runs = [(case, seed) for case in SAMPLED for seed in (1, 2)]
    for (case, seed), tokens in zip(runs, alone["sampled"], strict=True):
        torch.manual_seed(seed)
        want, _ = by_transformers(models["untied"], PROMPTS[0], do_sample=True, eos_token_id=STOPS, **case)
        assert tokens == want, case


def test_what_prompts_share_is_computed_once(alone: Any) -> None:
    reused, computed = alone["samples_reused"], alone["samples_computed"]
    assert reused[0] == computed[0] and len({tuple(tokens) for tokens in reused[0]}) == 5
    # five samples: the prompt once, its last token for the other four, two more tokens of each answer
    assert (reused[1], computed[1]) == (len(HEADER) + 4 + 5 * 2, 5 * len(HEADER) + 5 * 2)
    reused, computed = alone["sharing_reused"], alone["sharing_computed"]
    own = sum(len(prompt) - len(HEADER) for prompt in SHARING)
    steps = len(SHARING) * (NUM_NEW - 1)
    assert reused[0] == computed[0]
    assert (reused[1], computed[1]) == (len(HEADER) + own + steps, sum(map(len, SHARING)) + steps)
    # a later call that goes on where one ended (the next turn of a chat): its last token and what is new
    assert (alone["turn_reused"], alone["turn_computed"]) == (3, len(HEADER) + NUM_NEW + 2)
    inputs = [tuple([*context, *continuation][:-1]) for context, continuation in PAIRS if continuation]
    different = {path[:end] for path in inputs for end in range(1, len(path) + 1)}
    assert (alone["scored_reused"], alone["scored_computed"]) == (len(different), sum(map(len, inputs)))


def test_the_cache_stays_below_its_limit_or_nothing_starts(alone: Any, expected: Any) -> None:
    tokens, rows, size = alone["limited"]
    longest = len(PROMPTS[3]) + NUM_NEW - 1
    assert tokens == expected["untied"] and rows == 2 and size == 2 * longest * 2 * 4 * 6 * 16 * 4
    for name in ("generate", "stream", "beams", "score"):
        said = alone[f"too_long_{name}"]
        for part in ("--max-kv-cache-gb", "GiB", "tokens", "int8"):
            assert part in said
    assert "2 beams" in alone["too_long_beams"] and f"({longest} tokens of 3072 bytes)" in alone["too_long_stream"]


def test_an_int8_cache_rounds_each_value_by_half_a_step_of_its_head_and_token() -> None:
    torch.manual_seed(0)
    full, small = (KVCache([1], 2, 9, 3, 16, dtype=torch.float32, device=torch.device("cpu"), is_int8=is_int8)
                   for is_int8 in (False, True))
    key, value = torch.randn(7, 3, 16) * torch.logspace(-3, 3, 7)[:, None, None], torch.randn(7, 3, 16)
    key[2, 1] = 0.0
    for cache in (full, small):
        cache.begin([Piece(0, 0, [1, 2, 3, 4]), Piece(1, 0, [5, 6, 7])])
        cache.place()
        cache.attend(1, torch.randn(7, 6, 16), key, value)
        cache.end()
        cache.copy(0, 1, 3)
        cache.arrange([1, 0])
    for which, row, count in ((0, 1, 4), (0, 0, 3), (1, 1, 4), (1, 0, 3)):
        exact, near = (cache._read(1, which, slice(row, row + 1), count) for cache in (full, small))
        step = exact.abs().amax(-1, keepdim=True) / 127
        assert ((exact - near).abs() <= step * 0.5001).all() and near.isfinite().all()
        assert (exact - near).abs().max() > 0


def test_an_int8_cache_is_near_the_full_one_and_smaller(alone: Any) -> None:
    scale = max(float(logits.abs().max()) for logits in alone["logits"])
    errors = [float((small - full).abs().max()) for small, full in zip(alone["int8_logits"], alone["logits"])]
    assert 0 < max(errors) < 0.02 * scale
    # heads of 16 fp32 values against 16 bytes and a scale of 4
    assert alone["int8"][1] / alone["full"][1] == pytest.approx(20 / 64)


@pytest.mark.parametrize(("world", "layout", "name"), CASES)
def test_the_groups_that_start_are_those_in_use(results: Results, world: str, layout: str, name: str) -> None:
    """Stages only send to each other; a collective over all of them would take memory for nothing."""
    for seen in results[world]:
        started, used, counted = seen[layout, name]["groups"]
        assert with_collectives(started) == set(counted)
        assert with_collectives(used) == set(counted) - {"world"}  # by which the ranks join
        assert with_messages(started) == with_messages(used)
        assert not with_messages(used) or "PP2" in layout
