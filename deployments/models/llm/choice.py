"""One choice of a request while it is generated: its options, its text so far, and when it ends.

Owns: the payload of a language model's sequence. Written by the model thread alone once it is submitted.
Must not know: logits, the engine. Source: OpenAI's API reference for what ends a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from deployments.core.generation import Delta, FinishReason, Sampling, TokenLogprob
from deployments.models.llm.grammar import Matcher
from deployments.models.llm.text import Detokenizer, StopStrings, TokenBytes


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the sampler chose for one row.

    is_finite: False where the row's logits hold NaN or an infinity; the token means nothing then.
    is_dead_end: the grammar allows no token. logprob: of the token, where asked for; top: the most
    probable (id, logprob), best first.
    """

    token: int
    is_finite: bool = True
    is_dead_end: bool = False
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Ending:
    """What ends a text: max_tokens (at least 1), stop strings, the end tokens' ids."""

    max_tokens: int
    stop: tuple[str, ...] = ()
    eos: frozenset[int] = frozenset()


class Vocabulary:
    """What choices need of a tokenizer; shared by all."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._bytes = TokenBytes(tokenizer)

    def logprob(self, token: int, logprob: float, top: Sequence[tuple[int, float]] = ()) -> TokenLogprob:
        data = self._bytes.of(token)
        others = tuple(self.logprob(other, value) for other, value in top)
        return TokenLogprob(data.decode("utf-8", "replace"), logprob, data, others)


class Choice:
    """Lives from submit to the last delta. seed: of this choice, 64 bits of it count.

    counts: occurrences among the generated tokens of each token seen, the prompt's included (with 0);
    kept only where a penalty needs them. matcher: the grammar's, None without one or after the end.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt: Sequence[int],
        *,
        sampling: Sampling,
        ending: Ending,
        seed: int = 0,
        matcher: Matcher | None = None,
    ) -> None:
        self.sampling, self.seed, self.matcher = sampling, seed, matcher
        self.prompt_tokens, self.tokens = len(prompt), 0
        self.counts = dict.fromkeys(prompt, 0) if has_penalties(sampling) else None
        self._vocabulary, self._ending = vocabulary, ending
        self._detokenizer = Detokenizer(vocabulary.tokenizer)
        self._stops = StopStrings(ending.stop)
        self._logprobs: list[TokenLogprob] = []

    def accept(self, sampled: Sampled, *, cached_tokens: int = 0) -> Delta:
        """Take the next token; with a finish_reason in the answer the choice is done.

        Raises InvalidItem where its grammar has come to a dead end.
        """
        self.tokens += 1
        if self.counts is not None:
            self.counts[sampled.token] = self.counts.get(sampled.token, 0) + 1
        if self.sampling.top_logprobs is not None:
            entry = self._vocabulary.logprob(sampled.token, sampled.logprob, sampled.top)
            self._logprobs.append(entry)
        is_complete = self._follow_grammar(sampled)
        text, reason = self._extend(sampled.token, is_complete)
        logprobs: tuple[TokenLogprob, ...] = ()
        if self._logprobs and (text or reason):
            logprobs, self._logprobs = tuple(self._logprobs), []
        if reason:
            self.matcher = None
        return Delta(text, self.tokens, cached_tokens, logprobs, reason)

    def _follow_grammar(self, sampled: Sampled) -> bool:
        if self.matcher is None:
            return False
        if sampled.is_dead_end:
            raise self.matcher.dead_end()
        return self.matcher.accept(sampled.token)

    def _extend(self, token: int, is_complete: bool) -> tuple[str, FinishReason | None]:
        """Text to show now, and why the text ends here if it does."""
        if token in self._ending.eos:
            return self._flush(), FinishReason.STOP
        text = self._stops.push(self._detokenizer.push(token))
        if self._stops.is_hit:
            return text, FinishReason.STOP
        if is_complete:
            return text + self._flush(), FinishReason.STOP
        if self.tokens >= self._ending.max_tokens:
            return text + self._flush(), FinishReason.LENGTH
        return text, None

    def _flush(self) -> str:
        return self._stops.push(self._detokenizer.flush()) + self._stops.flush()


def has_penalties(sampling: Sampling) -> bool:
    repetition = sampling.repetition_penalty != 1.0
    return repetition or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
