"""Text to tokens, and tokens to the text a client may see: whole characters, never past a stop string.

Owns: encoding, detokenising, what is held back and for how long, the bytes of a token. Must not know:
sampling, the engine. Source: tokenizers' DecodeStream, since decoding token by token breaks characters of
several bytes.
"""

from functools import lru_cache

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

LONG = 16 * 1024
"""Characters from which on `encode` would keep all other threads waiting: it holds the interpreter's lock,
0.4 s for 475,000 characters, and `encode_batch` does not."""


def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of the text. Others run meanwhile, however long it is."""
    if len(text) <= LONG:
        return list(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
    (encoding,) = tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
    return list(encoding.ids)


class Detokenizer:
    """The text of one choice. `push` gives what is complete, `flush` the rest."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._given = 0  # characters

    def push(self, token: int) -> str:
        """Characters that are whole with `token`; special tokens have no text. 1.2 us."""
        self._tokens.append(token)
        try:
            text = self._stream.step(self._tokenizer, token) or ""
        except Exception:  # its only type; see _anew
            text = self._anew()
        self._given += len(text)
        return text

    def _anew(self) -> str:
        """Byte tokens that are no UTF-8 after all: the text no longer begins with what was given, and
        DecodeStream gives up ("Invalid prefix"). Go on behind as many characters as were given."""
        self._stream = DecodeStream(ids=self._tokens, skip_special_tokens=True)
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)[self._given :]
        return text.rstrip("\ufffd")  # maybe the beginning of a character

    def flush(self) -> str:
        """What was held for a next token that won't come; half a character becomes U+FFFD."""
        return self._tokenizer.decode(self._tokens, skip_special_tokens=True)[self._given :]


class StopStrings:
    """Cuts a text before the first stop string. Holds back only what may become one.

    First is the one that is complete first, so how the text falls into tokens changes nothing.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.is_hit = False

    def push(self, text: str) -> str:
        """The part of what came so far that may be shown now; `is_hit` once a stop string is complete."""
        if not self._stops:
            return text
        text = self._held + text
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.is_hit, self._held = True, ""
            return text[: min(ends)[1]]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, once it is certain that no stop string follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, shorter than `stop`."""
    at = max(0, len(text) - len(stop) + 1)
    while (at := text.find(stop[0], at)) >= 0:
        if stop.startswith(text[at:]):
            return len(text) - at
        at += 1
    return 0


class TokenBytes:
    """The bytes behind each token id; a special token's are its name's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._is_byte_level = "ByteLevel" in repr(tokenizer.decoder)
        self._added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}

    def of(self, token: int) -> bytes:
        """Empty for an id without a token: embeddings are often padded beyond the vocabulary."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.id_to_token(token) or ""
        if self._is_byte_level:
            table = _byte_level_table()
            return b"".join(table.get(char, char.encode()) for char in piece)
        if len(piece) == 6 and piece.startswith("<0x"):  # SentencePiece's byte fallback: <0x0A>
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()


@lru_cache(maxsize=1)
def _byte_level_table() -> dict[str, bytes]:
    """GPT-2's letters for bytes: printable ones are themselves, the rest follow from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): bytes([byte]) for byte in printable}
    return table | {chr(0x100 + i): bytes([byte]) for i, byte in enumerate(others)}
