"""WAV files to int16 samples, mono at 16 kHz: reading that a hostile header can't break.

Owns: which files are taken, mixing down, resampling (soxr), the limits. Must not know: what the
samples are for. Every refusal is a ValueError whose text says what to change. Memory: at most 4 times
the file (8 bit at 8 kHz becomes 16 bit at 16 kHz), and a block. Sources: "Multimedia Programming
Interface and Data Specifications 1.0" (RIFF, 1991); libsndfile, which decodes.
"""

import io
import struct
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr

RATE = 16_000
MIN_RATE, MAX_RATE = 8_000, 48_000
MAX_PARTS = 1_000
"""Parts of a file before its audio; recorders write fewer than 10."""

_SUBTYPES = ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")
_BLOCK = 65_536  # frames decoded at once: 512 kB of float32 stereo
_UNKNOWN_LENGTH = 0xFFFF_FFFF  # what a recorder writes that can't seek back


def read_wav(data: bytes) -> bytes:
    """A WAV file of 8 to 48 kHz, mono or stereo, 8 to 32 bit or float -> little-endian int16, 16 kHz.

    Stereo is mixed down to its mean. Raises ValueError for other containers and encodings, damaged or
    cut files, headers that contradict the file, and files without a sample.
    """
    _check(_read_header(data))
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.subtype not in _SUBTYPES:
                raise ValueError(f"the WAV is encoded as {file.subtype}: save it as 16-bit PCM")
            return _resampled(file)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"the WAV is damaged: {error}") from error


def _resampled(file: soundfile.SoundFile) -> bytes:
    stream = soxr.ResampleStream(file.samplerate, RATE, 1, dtype="float32")
    samples = bytearray()
    while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
        if not np.isfinite(block).all():
            raise ValueError("the WAV holds NaN or infinite samples")
        mono = block.mean(axis=1)
        samples += _as_int16(mono if file.samplerate == RATE else stream.resample_chunk(mono))
    if file.samplerate != RATE:
        samples += _as_int16(stream.resample_chunk(np.empty(0, np.float32), last=True))
    if not samples:
        raise ValueError("the WAV holds no samples")
    return bytes(samples)


def _as_int16(samples: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> bytes:
    scaled = np.clip(np.rint(samples * 32768.0), -32768, 32767)
    return bytes(scaled.astype("<i2").data)


# The header. libsndfile takes what it is told: it clips a length that is too great, reads on where a
# part is missing, and knows 25 other containers.


@dataclass(frozen=True, slots=True)
class _Header:
    """As the file claims; `held` bytes of audio are really there."""

    channels: int
    rate: int
    frame_bytes: int
    bits: int
    claimed: int
    held: int


def _read_header(data: bytes) -> _Header:
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise ValueError(f"expected a WAV file (RIFF), got {_container_of(data)}")
    layout: tuple[int, ...] | None = None
    at = 12
    for _ in range(MAX_PARTS):
        if at + 8 > len(data):
            break
        name, size = struct.unpack_from("<4sI", data, at)
        at += 8
        if name == b"fmt ":
            if size < 16 or at + 16 > len(data):
                raise ValueError("the WAV is damaged: its format header is cut off")
            _, *layout_found = struct.unpack_from("<HHIIHH", data, at)
            layout = tuple(layout_found)
        if name == b"data":
            if layout is None:
                raise ValueError("the WAV is damaged: its audio comes before its format header")
            channels, rate, _, frame_bytes, bits = layout
            return _Header(channels, rate, frame_bytes, bits, size, len(data) - at)
        at += size + size % 2  # parts are padded to an even length
    raise ValueError("the WAV is cut off or damaged: it has no audio")


def _check(header: _Header) -> None:
    if not MIN_RATE <= header.rate <= MAX_RATE:
        raise ValueError(
            f"the WAV has {header.rate} samples a second: resample it to between {MIN_RATE} and {MAX_RATE}"
        )
    if header.channels not in (1, 2):
        raise ValueError(f"the WAV has {header.channels} channels: mix it down to one or two")
    if header.frame_bytes != header.channels * ((header.bits + 7) // 8) or not header.bits:
        raise ValueError(
            f"the WAV is damaged, or not PCM: {header.bits} bits in {header.channels} channels are "
            f"not {header.frame_bytes} bytes a sample; save it as 16-bit PCM"
        )
    if header.claimed != _UNKNOWN_LENGTH and header.claimed > header.held:
        raise ValueError(
            f"the WAV is cut off: its header promises {header.claimed} bytes of audio, "
            f"{header.held} are there"
        )
    if min(header.claimed, header.held) < header.frame_bytes:
        raise ValueError("the WAV holds no samples")


def _container_of(data: bytes) -> str:
    if not data:
        return "nothing: it is empty"
    starts = {
        b"fLaC": "FLAC", b"OggS": "Ogg", b"ID3": "MP3", b"\xff\xfb": "MP3", b"\xff\xf3": "MP3",
        b"RF64": "RF64", b"RIFX": "a big-endian RIFX", b"FORM": "AIFF", b"caff": "CAF",
        b"\x1aE\xdf\xa3": "WebM or Matroska", b"RIFF": "another RIFF file",
    }  # fmt: skip
    if data[4:8] == b"ftyp":
        return "MP4; convert it to WAV"
    name = next((name for start, name in starts.items() if data.startswith(start)), "")
    return f"{name}; convert it to WAV" if name else "something else"
