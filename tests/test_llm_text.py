"""Tokens to text: whole characters, stop strings over token borders, ends; with SmolLM2's real tokenizer."""

import json
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from deployments.core.errors import InvalidItem
from deployments.core.generation import Delta, FinishReason, Sampling
from deployments.models import smollm2
from deployments.models.llm import grammar
from deployments.models.llm.choice import Choice, Ending, Sampled, Vocabulary
from deployments.models.llm.grammar import GrammarCompiler
from deployments.models.llm.text import LONG, Detokenizer, StopStrings, TokenBytes, encode

EOS = 2
HARD = "naïve 食べ物 🤦🏽‍♂️ é\u0301 \ufffd 12345\n\n"


@pytest.fixture(scope="module")
def shipped() -> Path:
    """The real cache: only the first test run on a machine converts."""
    return smollm2.shipped()


@pytest.fixture(scope="module")
def tokenizer(shipped: Path) -> Tokenizer:
    return Tokenizer.from_file(str(shipped / "tokenizer.json"))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, 49_152, [EOS])


def feed(choice: Choice, tokens: Sequence[int]) -> list[Delta]:
    """All deltas until the choice is done or the tokens are."""
    deltas = []
    for token in tokens:
        deltas.append(choice.accept(Sampled(token, logprob=-1.0)))
        if deltas[-1].finish_reason:
            break
    return deltas


def start(tokenizer: Tokenizer, *, sampling: Sampling | None = None, **ending: object) -> Choice:
    options = {"max_tokens": 10**6, "eos": frozenset([EOS]), **ending}
    return Choice(Vocabulary(tokenizer), [1], sampling=sampling or Sampling(), ending=Ending(**options))  # type: ignore[arg-type]


def joined(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_characters_of_several_tokens_come_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(HARD.replace("\ufffd", "")).ids
    deltas = feed(start(tokenizer), [*ids, EOS])
    assert joined(deltas) == HARD.replace("\ufffd", "")
    assert not any("\ufffd" in delta.text for delta in deltas)
    assert any(delta.text == "" for delta in deltas[:-1])


@pytest.mark.parametrize("seed", range(40))
def test_any_tokens_give_what_decoding_them_at_once_gives(tokenizer: Tokenizer, seed: int) -> None:
    """Broken bytes, special tokens, an end in mid-character included."""
    rng = random.Random(seed)
    ids = [rng.choice([rng.randrange(49_152), 17 + rng.randrange(256)]) for _ in range(60)]
    ids = [token for token in ids if token != EOS]
    deltas = feed(start(tokenizer, max_tokens=len(ids)), ids)
    assert joined(deltas) == tokenizer.decode(ids)
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    assert all(delta.text.encode() is not None for delta in deltas)


def test_half_a_character_at_the_end_is_flushed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok 食").ids
    deltas = feed(start(tokenizer), [*ids[:-1], EOS])
    assert joined(deltas) == tokenizer.decode(ids[:-1])
    assert joined(deltas).startswith("ok")
    assert joined(deltas).endswith("\ufffd")


def cut(pieces: Sequence[str], stops: Sequence[str]) -> tuple[str, list[str], bool]:
    watch = StopStrings(tuple(stops))
    shown: list[str] = []
    for piece in pieces:
        shown.append(watch.push(piece))
        if watch.is_hit:
            return "".join(shown), shown, True
    shown.append(watch.flush())
    return "".join(shown), shown, False


def reference(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The stop string that is complete first; of several the longest."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_cut_the_same_whatever_the_tokens(pieces: list[str], stops: list[str]) -> None:
    text, _, is_hit = cut(pieces, stops)
    assert (text, is_hit) == reference("".join(pieces), stops)


def test_only_what_may_become_a_stop_string_is_held() -> None:
    _, shown, _ = cut(["one ", "two\n", "x", "three\n", "\n", "END", "more"], ["\n\nEND"])
    assert shown == ["one ", "two", "\nx", "three", "", ""]


def test_a_long_stop_string_costs_little() -> None:
    watch = StopStrings(("ab" * 500 + "c",) * 16)
    for _ in range(2000):
        watch.push("ab")
    assert watch.flush() == "ab" * 500


def test_text_after_a_false_alarm_is_delivered(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("count: 1, 2, 3 stop not").ids
    deltas = feed(start(tokenizer, stop=("stop now", "xyz")), [*ids, EOS])
    assert joined(deltas) == "count: 1, 2, 3 stop not"


def test_the_stop_string_is_no_part_of_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The end. Question: what?").ids
    deltas = feed(start(tokenizer, stop=("stion", "End")), ids)
    assert joined(deltas) == "The end. Que"
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert deltas[-1].tokens == len(deltas)


def test_what_was_held_comes_with_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a b c").ids
    deltas = feed(start(tokenizer, stop=(" c d",), max_tokens=len(ids)), ids)
    assert joined(deltas) == "a b c"
    assert deltas[-1].finish_reason is FinishReason.LENGTH


def test_the_end_token_stops_unless_ignored(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("hi").ids, EOS, *tokenizer.encode(" there").ids]
    deltas = feed(start(tokenizer), ids)
    assert (joined(deltas), deltas[-1].finish_reason) == ("hi", FinishReason.STOP)
    deltas = feed(start(tokenizer, eos=frozenset(), max_tokens=len(ids)), ids)
    assert (joined(deltas), deltas[-1].finish_reason) == ("hi there", FinishReason.LENGTH)


def test_every_token_has_its_logprob_by_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(HARD).ids
    deltas = feed(start(tokenizer, sampling=Sampling(top_logprobs=1), stop=("zzz",)), [*ids, EOS])
    entries = [entry for delta in deltas for entry in delta.logprobs]
    assert len(entries) == len(ids) + 1 == deltas[-1].tokens
    assert b"".join(entry.data for entry in entries[:-1]).decode() == HARD
    assert all(delta.text or delta.finish_reason or not delta.logprobs for delta in deltas)


def test_alternatives_have_their_text_and_bytes(tokenizer: Tokenizer) -> None:
    choice = start(tokenizer, sampling=Sampling(top_logprobs=2))
    token = tokenizer.encode(" Paris").ids[0]
    (entry,) = choice.accept(Sampled(token, logprob=-0.1, top=((token, -0.1), (EOS, -3.0)))).logprobs
    assert (entry.token, entry.logprob, entry.data) == (" Paris", -0.1, b" Paris")
    assert [(top.token, top.logprob) for top in entry.top] == [(" Paris", -0.1), ("<|im_end|>", -3.0)]


def test_bytes_of_all_tokens_are_those_of_the_decoder(tokenizer: Tokenizer) -> None:
    pieces = TokenBytes(tokenizer)
    for token in range(49_152):
        if token > 16:
            assert pieces.of(token).decode("utf-8", "replace") == tokenizer.decode([token])
    assert pieces.of(60_000) == b""


@pytest.mark.parametrize("special", [True, False])
def test_long_texts_are_encoded_as_short_ones(tokenizer: Tokenizer, special: bool) -> None:
    text = "So long<|im_end|> naïve " * (LONG // 10)
    assert encode(tokenizer, text, add_special_tokens=special) == list(
        tokenizer.encode(text, add_special_tokens=special).ids
    )


def test_a_long_text_keeps_no_other_thread_waiting(tokenizer: Tokenizer) -> None:
    gaps_s, is_done = [0.0], threading.Event()

    def tick() -> None:
        last = time.perf_counter()
        while not is_done.wait(0.001):
            now = time.perf_counter()
            gaps_s.append(now - last)
            last = now

    ticker = threading.Thread(target=tick)
    ticker.start()
    began = time.perf_counter()
    encode(tokenizer, "some words here " * 60_000, add_special_tokens=False)
    took_s = time.perf_counter() - began
    is_done.set()
    ticker.join()
    assert max(gaps_s) < 0.5 * took_s


def test_sentence_piece_tokens_work_too() -> None:
    vocabulary = {"<unk>": 0, "▁Hi": 1, "▁you": 2, "<0xE9>": 3, "<0xA3>": 4, "<0x9F>": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    detokenizer = Detokenizer(tokenizer)
    assert "".join(detokenizer.push(token) for token in [1, 2, 3, 4, 5]) + detokenizer.flush() == "Hi you食"
    assert [TokenBytes(tokenizer).of(token) for token in (1, 3)] == [b" Hi", b"\xe9"]


@pytest.mark.parametrize("tail", [[], [3], [3, 4], [3, 4, 5], [2, 3, 6]])
def test_bytes_that_are_no_character_after_all_do_not_end_the_text(tail: list[int]) -> None:
    vocabulary = {"<unk>": 0, "▁Hi": 1, "▁you": 2, "<0xE9>": 3, "<0xA3>": 4, "<0x9F>": 5, "<0x0A>": 6}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in [1, 6, 3, 2, 2, *tail]]
    assert "".join(pieces) + detokenizer.flush() == "Hi\n\ufffd you you" + tokenizer.decode([1, *tail])[2:]


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_a_complete_text_ends_the_choice(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    text = '{"name": "Zoë", "age": 41}'
    matcher = compiler.compile(json.dumps(PERSON))
    ending = Ending(max_tokens=100, eos=frozenset([EOS]))
    choice = Choice(Vocabulary(tokenizer), [1], sampling=Sampling(), ending=ending, matcher=matcher.copy())
    deltas = feed(choice, [*tokenizer.encode(text).ids, 99])
    assert (joined(deltas), deltas[-1].finish_reason) == (text, FinishReason.STOP)
    assert choice.matcher is None


def test_a_schema_is_compiled_once_and_followed_by_each_text_on_its_own(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    schema = json.dumps({**PERSON, "title": "sent again and again"})
    first, second = compiler.compile(schema), compiler.compile(schema)
    assert compiler._compiled.cache_info().hits >= 1
    tokens = tokenizer.encode('{"name": "A"').ids
    assert not any(first.accept(token) for token in tokens)
    assert not second.accept(tokens[0])  # still at its beginning


def test_a_token_against_the_grammar_is_an_error_not_a_hang(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    choice = Choice(
        Vocabulary(tokenizer),
        [1],
        sampling=Sampling(),
        ending=Ending(max_tokens=9),
        matcher=compiler.compile(json.dumps(PERSON)),
    )
    with pytest.raises(InvalidItem, match="can't go on within the schema") as caught:
        choice.accept(Sampled(tokenizer.encode("Hello").ids[0]))
    assert caught.value.param == "response_format"
    choice.matcher = compiler.compile("{}")
    with pytest.raises(InvalidItem, match="no token may follow"):
        choice.accept(Sampled(0, is_dead_end=True))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("not json", "not JSON"),
        ("[1]", "must be an object"),
        ("false", "must be an object"),
        ('{"type": "nope"}', "Invalid type"),
        ('{"enum": []}', "Unsatisfiable"),
        ('{"type": "integer", "minimum": 5, "maximum": 1}', "Unsatisfiable"),
        ('{"type": "object", "required": ["a"], "properties": {"a": false}}', "Unsatisfiable"),
        ('{"$ref": "http://example.com/schema"}', "example.com"),
        ('{"type": "string", "pattern": "("}', "regex"),
        ('{"not": {}}', "Unimplemented"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "deeper than 64"),
        ('{"allOf":[' * 40 + "{}" + "]}" * 40, "deeper than 64"),
        (json.dumps({"description": "x" * grammar.MAX_SCHEMA_BYTES}), "over 64 KiB"),
        ('{"title": "\ud800"}', "surrogates not allowed"),
        ('{"title": "\\ud800"}', "can't be used"),
    ],
)
def test_a_schema_that_cannot_be_used_says_why(compiler: GrammarCompiler, schema: str, message: str) -> None:
    with pytest.raises(InvalidItem, match=message) as caught:
        compiler.compile(schema)
    assert caught.value.param == "response_format"
