"""Generation around the engine: sampling against transformers, streaming text, stop strings, settings, the command."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from inference_cases import NUM_NEW, REPO, environment, make_place
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from modellink.data.tokenizer import load_tokenizer
from modellink.inference.request import Answer, Finish, NextToken, Request, SamplingSettings
from modellink.inference.sampling import Sampler, candidates, draw_together, processed
from modellink.inference.text import Detokenizer, StopStrings, answer_text, in_order, stream_text


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("inference"))


def test_top_k_and_top_p_in_closed_form() -> None:
    shares = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    logits = shares.log() + 3

    def kept(**values: Any) -> dict[int, float]:
        ids, scores = candidates(logits, SamplingSettings(greedy=False, **values))
        return {token: share for token, share in zip(ids.tolist(), scores.softmax(0).tolist()) if share}

    assert kept() == pytest.approx(dict(enumerate(shares.tolist())))
    assert kept(top_k=2) == pytest.approx({1: 4 / 7, 3: 3 / 7})
    assert kept(top_p=0.69) == pytest.approx({1: 4 / 7, 3: 3 / 7})
    assert kept(top_p=0.71) == pytest.approx({1: 0.4 / 0.85, 3: 0.3 / 0.85, 4: 0.15 / 0.85})
    assert kept(top_k=3, top_p=0.81) == pytest.approx({1: 4 / 7, 3: 3 / 7})  # top_p of what top_k has left: 0.4 / 0.85
    assert kept(top_p=1e-6) == {1: 1.0} == kept(top_k=1)
    assert kept(top_k=2, temperature=0.5) == pytest.approx({1: 16 / 25, 3: 9 / 25})


@pytest.mark.parametrize("values", [
    {}, {"top_k": 50}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.6}, {"top_k": 5000, "top_p": 0.95}, {"min_p": 0.1},
    {"min_p": 1.0}, {"top_k": 30, "top_p": 0.9, "min_p": 0.05}, {"repetition_penalty": 1.3, "top_k": 40},
    {"repetition_penalty": 0.7}, {"min_new_tokens": 4, "top_p": 0.7}, {"min_new_tokens": 3}])
@pytest.mark.parametrize("least", [1, 3])
def test_the_distribution_is_that_of_transformers(values: dict[str, Any], least: int) -> None:
    prompt, answer, stops = [3, 5, 7, 11], [7, 13, 900], frozenset({2, 40, 41})
    for seed in range(20):
        logits = torch.randn(1, 1003, generator=torch.Generator().manual_seed(seed)) * 3
        logits[0, 40] = 20.0  # a stop token that would win
        settings = SamplingSettings(temperature=0.7, stop_ids=stops, **values)
        ids, kept = candidates(processed(logits[0], settings, prompt, answer), settings, least)
        steps: list[Any] = []
        if "repetition_penalty" in values:
            steps.append(RepetitionPenaltyLogitsProcessor(values["repetition_penalty"]))
        if "min_new_tokens" in values:
            steps.append(MinNewTokensLengthLogitsProcessor(len(prompt), values["min_new_tokens"], sorted(stops)))
        steps.append(TemperatureLogitsWarper(0.7))
        if "top_k" in values:
            steps.append(TopKLogitsWarper(values["top_k"], min_tokens_to_keep=least))
        if "top_p" in values:
            steps.append(TopPLogitsWarper(values["top_p"], min_tokens_to_keep=least))
        if "min_p" in values:
            steps.append(MinPLogitsWarper(values["min_p"], min_tokens_to_keep=least))
        want = LogitsProcessorList(steps)(torch.tensor([prompt + answer]), logits.clone())[0]
        possible = want.isfinite()
        got = torch.full((1003,), -torch.inf)
        got[ids] = kept
        assert torch.equal(got.isfinite(), possible) and bool(possible[40]) == (values.get("min_new_tokens", 0) < 4)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_the_presence_penalty_counts_the_answer_once() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0, -4.0])
    settings = SamplingSettings(presence_penalty=0.5)
    assert processed(logits, settings, [0], [2, 3, 2]).tolist() == [1.0, 2.0, 2.5, -4.5]
    assert processed(logits, settings, [0], []).tolist() == logits.tolist()


def test_settings_out_of_range() -> None:
    for values in ({"min_new_tokens": 200}, {"min_p": 1.1}, {"repetition_penalty": 0.0}, {"num_beams": 0},
                   {"early_stopping": "always"}):
        with pytest.raises(ValueError, match="out of range"):
            SamplingSettings(**values)


class TestStopStrings:
    """A stop string ends the answer, is not given out, and no beginning of it either."""

    def run(self, place: Path, text: str, stops: tuple[str, ...], last: Finish = "length",
            stop_id: int | None = None) -> tuple[str, list[str]]:
        """(text of the whole answer, pieces of the stream) of an answer that would say `text`."""
        tokenizer = load_tokenizer(place / "tokenizer")
        ids = tokenizer.encode(text) + ([] if stop_id is None else [stop_id])
        stop_ids = frozenset() if stop_id is None else frozenset({stop_id})
        request = Request([5], SamplingSettings(stop_ids=stop_ids), StopStrings(tokenizer, stops))
        assert request.watch is not None
        watch = request.watch()
        items = []
        for place_, token in enumerate(ids):
            finish: Finish = "stop" if watch.add(token) else last if place_ == len(ids) - 1 else ""
            items.append(NextToken(0, token, None, finish))
            if finish:
                break
        pieces = [piece for _, piece, _ in stream_text(items, tokenizer, [request])]
        answer = Answer([item.token for item in items if item.token is not None], None, items[-1].finish)
        return answer_text(answer, tokenizer, request), pieces

    @pytest.mark.parametrize("text, stops, want", [
        ("one two. Question: three", ("Question:",), "one two. "),
        ("one two. Quest, Question: three", ("Question:",), "one two. Quest, "),
        ("aaab aab", ("aab",), "a"),
        ("first 你好。第二", ("好。", "x"), "first 你"),
        ("a END b STOP", ("STOP", "END"), "a "),
        ("nothing of it", ("zzz",), "nothing of it")])
    def test_the_text_before_it(self, text: str, stops: tuple[str, ...], want: str, place: Path) -> None:
        whole, pieces = self.run(place, text, stops)
        assert whole == "".join(pieces) == want
        said = ""
        for piece in pieces:
            said += piece
            assert want.startswith(said)

    def test_a_beginning_of_it_where_the_answer_is_cut(self, place: Path) -> None:
        whole, pieces = self.run(place, "one Ques", ("Question:",))
        assert "".join(pieces) == "one " and whole == "one Ques"
        # a stop token ends it: what was held back is text
        whole, pieces = self.run(place, "one Ques", ("Question:",), "stop", stop_id=0)
        assert "".join(pieces) == whole == "one Ques"

    def test_empty_ones_are_refused(self, place: Path) -> None:
        for stops in ((), ("a", "")):
            with pytest.raises(ValueError, match="stop strings"):
                StopStrings(load_tokenizer(place / "tokenizer"), stops)


def test_samples_come_as_often_as_they_are_likely() -> None:
    shares = [0.1, 0.4, 0.05, 0.3, 0.15]
    sampler = Sampler(SamplingSettings(greedy=False, top_k=4, seed=3))
    logits, draws = torch.tensor(shares).log(), 4000
    counts = torch.bincount(torch.stack([sampler.choose(logits) for _ in range(draws)]), minlength=5).tolist()
    assert counts[2] == 0
    for count, share in zip(counts, [0.1, 0.4, 0.0, 0.3, 0.15]):
        p = share / 0.95
        assert abs(count - draws * p) <= 4 * math.sqrt(draws * p * (1 - p))


def test_numbers_drawn_ahead_are_those_drawn_alone() -> None:
    """Request by request, also where one ends, another joins and one is alone for a step."""
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(1))
    together, alone = ([Sampler(SamplingSettings(greedy=False, seed=seed)) for seed in range(3)] for _ in range(2))
    for step, rows in enumerate(([0, 1, 2], [0, 1], [1], [], [1, 2], [0, 1, 2])):
        draw_together([together[row] for row in rows], 500)
        got = [int(together[row].choose(logits[step])) for row in rows]
        assert got == [int(alone[row].choose(logits[step])) for row in rows]
    assert len({int(sampler.choose(logits[0])) for sampler in alone}) > 1


@pytest.mark.parametrize("text", ["你好，世界！再见", "naïve café — ok", "🙂 \U0001f469\u200d\U0001f467 x",
                                  "a\n\n  b\tc ", "plain"])
def test_text_comes_in_whole_characters(text: str, place: Path) -> None:
    tokenizer = load_tokenizer(place / "tokenizer")
    ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in ids]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "".join(pieces) == text and detokenizer.finish() == ""
    # characters come as soon as they are whole
    assert all("".join(pieces[:count]) == tokenizer.decode(ids[:count]).rstrip("\N{REPLACEMENT CHARACTER}")
               for count in range(len(ids)))


def test_any_tokens_give_the_text_of_all_of_them_at_once(place: Path) -> None:
    tokenizer = load_tokenizer(place / "tokenizer")
    for seed in range(30):
        ids = torch.randint(3, 900 if seed % 2 else 260, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
        detokenizer = Detokenizer(tokenizer)
        text = "".join([*map(detokenizer.add, ids), detokenizer.finish()])
        assert text == tokenizer.decode(ids, skip_special_tokens=True)


def test_spaces_survive_in_tokenizers_that_cut_them_at_the_start() -> None:
    words = Tokenizer(WordLevel({"▁the": 0, "▁class": 1, "es": 2, "<unk>": 3}, unk_token="<unk>"))
    words.decoder = decoders.Metaspace()
    detokenizer = Detokenizer(PreTrainedTokenizerFast(tokenizer_object=words))
    assert [detokenizer.add(token) for token in (0, 1, 2, 0)] == ["the", " class", "es", " the"]


def test_answers_are_shown_one_after_another_as_they_come(place: Path) -> None:
    tokenizer = load_tokenizer(place / "tokenizer")
    words = {word: tokenizer.encode(word) for word in ("a", "b", "c")}
    a, b, c = (words[word][0] for word in ("a", "b", "c"))
    stop = 1
    settings = [SamplingSettings(max_new_tokens=3), SamplingSettings(max_new_tokens=9, stop_ids=frozenset({stop})),
                SamplingSettings(max_new_tokens=2)]
    requests = [Request([5], setting) for setting in settings]
    tokens: list[tuple[int, int, Finish]] = [(0, a, ""), (1, b, ""), (2, c, ""), (0, b, ""), (1, stop, "stop"),
                                             (2, a, "length"), (0, c, "length")]
    seen: list[tuple[int, int, str, bool]] = []
    read = 0

    def stream() -> Any:
        nonlocal read
        for item in tokens:
            read += 1
            yield NextToken(item[0], item[1], None, item[2])

    for index, piece, is_last in in_order(stream_text(stream(), tokenizer, requests), 3):
        seen.append((read, index, piece, is_last))
    assert seen == [(1, 0, "a", False), (4, 0, "b", False), (7, 0, "c", True), (7, 1, "b", True), (7, 2, "ca", True)]


def flags(place: Path, *more: str) -> list[str]:
    return ["--load", str(place / "untied_mg"), "--tokenizer-name-or-path", str(place / "tokenizer"), "--device", "cpu",
            "--max-new-tokens", str(NUM_NEW), *more]


def answer_of(place: Path, prompt: str, num_new: int = NUM_NEW, dtype: torch.dtype = torch.float32) -> str:
    """Prompt and greedy answer by transformers."""
    tokenizer = load_tokenizer(place / "tokenizer")
    model = Qwen2ForCausalLM.from_pretrained(place / "untied", dtype=dtype)
    ids = model.generate(torch.tensor([tokenizer.encode(prompt)]), max_new_tokens=num_new, do_sample=False,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=0)[0]
    return prompt + tokenizer.decode(ids[len(tokenizer.encode(prompt)):], skip_special_tokens=True)


def test_the_command_in_a_plain_process(place: Path) -> None:
    prompts = ["The class statement", "名字 and"]
    done = subprocess.run([sys.executable, str(REPO / "inference.py"), *flags(
        place, "--prompt", *prompts, "--task", "greedy", "do_sample")], env=environment(), capture_output=True,
        timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    out = done.stdout.decode("utf-8")
    assert out.startswith("".join(f"[greedy] {answer_of(place, prompt)}\n" for prompt in prompts))
    assert out.count("[do_sample] ") == 2 and b"tokens/s" in done.stderr


def test_a_generate_script_on_two_ranks(place: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(REPO / "examples/qwen15/generate_qwen15_7b_ptd.sh"), "--device", "cpu", "--fp32",
         "--max-new-tokens", "6"],
        env={**environment(), "PYTHON": sys.executable, "TP": "2", "PROMPT": "The class", "CHECKPOINT":
             str(place / "untied_mg"), "TOKENIZER_PATH": str(place / "tokenizer")},
        capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"[greedy] {answer_of(place, 'The class', 6)}\n" in done.stdout
