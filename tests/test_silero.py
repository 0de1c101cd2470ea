"""silero-vad in batches of streams equals the package's own model; WAV files, whole and broken."""

import base64
import importlib.util
import io
import struct
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from deployments.core.contract import Streams
from deployments.core.errors import InvalidItem
from deployments.engine.sequence import Sequence, Step, Work
from deployments.models.silero_vad import FRAME, MAX_FRAMES, SileroVad
from deployments.models.speech_segments import find_segments
from deployments.models.wav import read_wav
from deployments.runtime.stepwise import StepModel

SPEECH = (Path(__file__).parent / "data" / "speech.wav").read_bytes()


@pytest.fixture(scope="module")
def vad() -> StepModel:
    model = StepModel(SileroVad, {})
    model.load("cpu", 64)
    return model


@pytest.fixture(scope="module")
def package() -> Any:
    """The package's own TorchScript model, as load_silero_vad reads it."""
    spec = importlib.util.find_spec("silero_vad")
    assert spec is not None
    assert spec.origin is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(str(Path(spec.origin).parent / "data" / "silero_vad.jit"))


def step(model: StepModel, sequences: list[Sequence], ended: tuple[Sequence, ...] = ()) -> list[list[Any]]:
    works = [Work(s, s.computed, 1, s.remaining == 1) for s in sequences]
    outputs = []
    for sequence, advance in zip(
        sequences, model.run(Step(works, [], [], list(ended), [], "", 0.0)), strict=True
    ):
        assert advance.error is None
        sequence.computed += 1
        outputs.append(list(advance.outputs))
    return outputs


def stream(model: StepModel, pieces: list[bytes]) -> list[dict[str, float]]:
    """All results of one stream that comes in pieces, stepped alone."""
    sequence, results = model.prepare(None), []
    for piece in pieces:
        sequence.known += model.split(sequence, piece)
    sequence.known += model.finish_input(sequence)
    while sequence.remaining:
        results += step(model, [sequence])[0]
    step(model, [], ended=(sequence,))
    return results


def alone(package: Any, pcm: bytes) -> list[float]:
    """The package's model, frame by frame."""
    samples = torch.from_numpy(np.frombuffer(pcm, "<i2").astype(np.float32) / 32768)
    samples = torch.nn.functional.pad(samples, (0, -len(samples) % FRAME))
    package.reset_states()
    with torch.no_grad():
        return [package(frame, 16000).item() for frame in samples.split(FRAME)]


def speech_of(results: list[dict[str, float]]) -> list[float]:
    return [result["speech"] for result in results]


# The network


@pytest.mark.parametrize(
    "size", [1, 700, 2 * FRAME, 10_000, 1_000_000], ids=lambda size: f"{size} bytes a piece"
)
def test_a_stream_equals_the_packages_model_however_it_is_cut(
    vad: StepModel, package: Any, size: int
) -> None:
    pcm = read_wav(SPEECH)
    results = stream(vad, [pcm[i : i + size] for i in range(0, len(pcm), size)])
    expected = alone(package, pcm)
    assert max(expected) > 0.9  # the signal has speech in it
    assert speech_of(results) == pytest.approx(expected, abs=1e-5)
    assert [r["t_s"] for r in results] == pytest.approx([0.032 * (i + 1) for i in range(len(expected))])


def test_streams_of_different_lengths_step_together_and_equal_each_alone(
    vad: StepModel, package: Any
) -> None:
    pcm, rng = read_wav(SPEECH), np.random.default_rng(0)
    parts = [pcm[2 * int(a) : 2 * int(a) + 30_000] for a in rng.integers(0, 30_000, 12)]
    sequences = [vad.prepare(None) for _ in parts]
    results: list[list[Any]] = [[] for _ in parts]
    at = [0] * len(parts)
    while any(a < len(part) for a, part in zip(at, parts, strict=True)):
        for i, part in enumerate(parts):
            size = int(rng.integers(0, 20)) * 333
            sequences[i].known += vad.split(sequences[i], part[at[i] : at[i] + size])
            at[i] += size
        ready = [i for i in rng.permutation(len(parts)) if sequences[i].remaining]
        for i, outputs in zip(ready, step(vad, [sequences[i] for i in ready]), strict=True):
            results[i] += outputs
    for i, sequence in enumerate(sequences):
        sequence.known += vad.finish_input(sequence)
        while sequence.remaining:
            results[i] += step(vad, [sequence])[0]
    step(vad, [], ended=tuple(sequences))
    for part, found in zip(parts, results, strict=True):
        assert speech_of(found) == pytest.approx(alone(package, part), abs=1e-5)
    assert vad.state_bytes == 0


def test_chunks_hold_all_whole_frames_up_to_a_second(vad: StepModel) -> None:
    sequence = vad.prepare(None)
    assert vad.split(sequence, bytes(2 * FRAME * (MAX_FRAMES + 3) + 5)) == 2
    assert [len(chunk) for chunk in sequence.payload.chunks] == [MAX_FRAMES, 3]
    assert len(sequence.payload.rest) == 5


def test_an_odd_number_of_bytes_is_refused_at_the_end(vad: StepModel) -> None:
    sequence = vad.prepare(None)
    vad.split(sequence, b"\0" * 101)
    with pytest.raises(InvalidItem, match="odd number of bytes"):
        vad.finish_input(sequence)


def test_an_empty_stream_has_no_results(vad: StepModel) -> None:
    assert stream(vad, []) == []


# Segments


def test_segments_of_speech_equal_the_packages_own(vad: StepModel, package: Any) -> None:
    utils = pytest.importorskip("silero_vad.utils_vad")
    pcm = read_wav(SPEECH)
    samples = torch.from_numpy(np.frombuffer(pcm, "<i2").astype(np.float32) / 32768)
    samples = torch.nn.functional.pad(samples, (0, -len(samples) % FRAME))
    with torch.no_grad():
        expected = utils.get_speech_timestamps(samples, package)
    answer = vad.postprocess(stream(vad, [vad.read_item(SPEECH)]))
    assert len(expected) == 2
    assert answer == {
        "segments": [{"start_s": e["start"] / 16000, "end_s": e["end"] / 16000} for e in expected]
    }


def test_segments_of_any_probabilities_equal_the_packages_own() -> None:
    utils = pytest.importorskip("silero_vad.utils_vad")
    rng = np.random.default_rng(0)
    for _ in range(300):
        runs = rng.choice([0.05, 0.4, 0.95], 40).repeat(rng.integers(1, 9, 40))
        probabilities = np.clip(runs + rng.normal(0, 0.1, len(runs)), 0, 1).tolist()[: rng.integers(1, 200)]
        expected = utils.get_speech_timestamps_from_probs(probabilities)
        found = find_segments(probabilities, frame=FRAME, rate=16000)
        assert found == [(e["start"], e["end"]) for e in expected]


# What /predict and /v2 take


def test_the_card_says_what_it_takes(vad: StepModel) -> None:
    card = vad.card("vad")
    assert (card.streams, card.one_item, card.media_types) == (
        Streams.CHUNKS,
        True,
        ("audio/wav", "audio/x-wav"),
    )
    assert (card.inputs[0].datatype, card.outputs[0].name) == ("INT16", "speech")


def test_a_wav_in_base64_and_an_array_are_the_same_stream(vad: StepModel) -> None:
    pcm = read_wav(SPEECH)
    assert vad.read_item({"audio_b64": base64.b64encode(SPEECH).decode()}) == pcm
    assert vad.read_item(np.frombuffer(pcm, "<i2")) == pcm
    speech = vad.to_tensors(stream(vad, [pcm]))["speech"]
    assert (speech.dtype, speech.shape) == (np.float32, (-(-len(pcm) // (2 * FRAME)),))


@pytest.mark.parametrize(
    "item",
    [None, {}, {"audio_b64": 3}, {"audio_b64": "*"}, {"audio_b64": ""}, "text", [1, 2], b"",
     np.zeros((2, 3), np.int16), np.zeros(4, np.float32), np.zeros(0, np.int16)],
    ids=repr,
)  # fmt: skip
def test_other_items_are_refused(vad: StepModel, item: Any) -> None:
    with pytest.raises(InvalidItem):
        vad.read_item(item)


# WAV files


def wav(samples: Any, rate: int = 16000, subtype: str = "PCM_16", kind: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def tone(rate: int, seconds: float = 0.5, hz: float = 440.0) -> Any:
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize(
    "subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"]
)
def test_every_rate_depth_and_channel_count_gives_the_same_tone(
    subtype: str, rate: int, channels: int
) -> None:
    data = wav(np.stack([tone(rate)] * channels, 1), rate, subtype)
    samples = np.frombuffer(read_wav(data), "<i2") / 32768
    assert abs(len(samples) - 8000) <= 2
    middle = slice(500, 7500)  # resamplers ring at the ends
    assert np.abs(samples[middle] - tone(16000)[: len(samples)][middle]).max() < 0.02


def test_16_bit_at_16_khz_comes_through_bit_for_bit() -> None:
    samples = np.random.default_rng(0).integers(-32768, 32768, 5000).astype("<i2")
    assert read_wav(wav(samples)) == samples.tobytes()


def test_stereo_is_mixed_down_to_its_mean() -> None:
    assert not any(read_wav(wav(np.stack([tone(16000), -tone(16000)], 1))))


def test_too_loud_float_samples_are_clipped() -> None:
    assert np.frombuffer(read_wav(wav(np.array([3.0, -3.0]), subtype="FLOAT")), "<i2").tolist() == [
        32767,
        -32768,
    ]


def test_a_recorder_that_could_not_seek_back_is_understood() -> None:
    data = bytearray(wav(tone(16000)))
    at = data.index(b"data") + 4
    expected = read_wav(bytes(data))
    data[4:8] = data[at : at + 4] = b"\xff" * 4
    assert read_wav(bytes(data)) == expected


def header(data: bytes, offset: int, layout: str, value: int) -> bytes:
    """The file with one field of its format header replaced; offset from the header's first field."""
    changed = bytearray(data)
    struct.pack_into(layout, changed, changed.index(b"fmt ") + 8 + offset, value)
    return bytes(changed)


GOOD = wav(tone(16000, 0.1))
_DATA = GOOD.index(b"data")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "it is empty"),
        (b"RIFF", "another RIFF file"),
        (wav(tone(16000), kind="FLAC"), "got FLAC"),
        (wav(tone(16000), kind="OGG", subtype="VORBIS"), "got Ogg"),
        (b"ID3\x04" + bytes(100), "got MP3"),
        (wav(tone(16000), kind="AIFF"), "got AIFF"),
        (b"\0\0\0\x20ftypM4A " + bytes(100), "got MP4"),
        (b"just some text", "got something else"),
        (GOOD[:-100], "is cut off: its header promises 3200 bytes of audio, 3100 are there"),
        (GOOD[:_DATA], "no audio"),
        (GOOD[:30], "format header is cut off"),
        (GOOD[: _DATA + 8], "is cut off"),
        (wav(np.zeros(0)), "no samples"),
        (GOOD[:_DATA] + b"data" + struct.pack("<I", 0), "no samples"),
        (GOOD[:12] + GOOD[_DATA:], "before its format header"),
        (GOOD[:_DATA] + b"junk" + struct.pack("<I", 2**31) + GOOD[_DATA:], "no audio"),
        (GOOD[:12] + (b"junk" + bytes(4)) * 2000 + GOOD[12:], "no audio"),
        (wav(tone(4000), 4000), "4000 samples a second"),
        (wav(tone(16000), 96000), "96000 samples a second"),
        (header(GOOD, 4, "<I", 0), "0 samples a second"),
        (header(GOOD, 4, "<I", 2**32 - 1), "4294967295 samples a second"),
        (header(GOOD, 2, "<H", 0), "0 channels"),
        (header(GOOD, 2, "<H", 65535), "65535 channels"),
        (wav(np.zeros((100, 6))), "6 channels"),
        (header(GOOD, 12, "<H", 7), "not 7 bytes a sample"),
        (header(GOOD, 14, "<H", 0), "damaged, or not PCM"),
        (wav(tone(16000), subtype="MS_ADPCM"), "damaged, or not PCM"),
        (wav(np.array([0.0, np.nan]), subtype="FLOAT"), "NaN"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read_are_refused_with_a_sentence(data: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_wav(data)


def test_no_damage_raises_anything_but_value_error() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        data = bytearray(GOOD[:400])
        for at in rng.integers(0, 60, rng.integers(1, 4)):
            data[at] = rng.integers(0, 256)
        try:
            read_wav(bytes(data))
        except ValueError:
            continue


def test_memory_stays_within_a_few_times_the_file() -> None:
    data = wav(np.zeros(2_000_000), 8000, "PCM_U8")
    tracemalloc.start()
    try:
        assert len(read_wav(data)) == pytest.approx(4 * len(data), rel=0.01)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 * len(data)
