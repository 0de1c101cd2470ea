"""silero-vad: 16 kHz audio to a speech probability for each 32 ms, streams in batches.

Owns: the network, its weights, frames, the outputs; WAV files are read in wav.py, segments made in
speech_segments.py. Source: the PyPI package silero-vad: tinygrad_model.py is the network in Python; the
weights are silero_vad.jit's (its silero_vad_16k.safetensors is of another training: up to 0.2 off).
The convolutions become four matrix products, since a frame's STFT has four columns only: 9 us a frame in
batches of 256 against 52 as convolutions (2 cores, torch 2.13, best of 60).
"""

import base64
import importlib.util
import io
import warnings
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from operator import neg
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import soundfile
import torch
import torch.nn.functional as F

from deployments.models.encoded import read_encoded
from deployments.models.speech_segments import find_segments
from deployments.models.wav import RATE, read_wav

FRAME = 512
CONTEXT = 64  # samples of the frame before, in front of each frame
WINDOW, HOP, BINS = 256, 128, 129
CELL = 128

MAX_FRAMES = 32
"""Of a chunk: 1 s. A chunk's frames pass the convolutions at once, the cell one after the other; a longer
chunk would hold up the streams that share its step."""

_BLOCK = 256
"""Frames that pass the convolutions at once: 256 take 9 us each, 1024 take 20 to 30 (the cache is full)."""

Frames = np.ndarray[tuple[int, int], np.dtype[np.int16]]


class Network(torch.nn.Module):
    """The 16 kHz network: frames with context [N, 576] -> features [N, 128] -> cell -> probability.

    Served as TorchScript (`scripted`): a step of eager operators takes the interpreter's lock 150 times,
    each time from an event loop that is busy with messages. `forward` gives it away once.
    """

    # TorchScript knows a class's constants, not a module's.
    context: Final[int] = CONTEXT
    window: Final[int] = WINDOW
    hop: Final[int] = HOP
    bins: Final[int] = BINS
    cell: Final[int] = CELL
    block: Final[int] = _BLOCK

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        layers = [
            _as_product(weights, "encoder.0", columns=4, stride=1),  # 4 columns of 129 -> 4 of 128
            _as_product(weights, "encoder.1", columns=4, stride=2),  # -> 2 of 64
            _as_product(weights, "encoder.2", columns=2, stride=2),  # -> 1 of 64
            _as_product(weights, "encoder.3", columns=1, stride=1),  # -> 1 of 128
        ]
        self.layers = [weight for weight, _ in layers]
        self.biases = [bias for _, bias in layers]
        self.stft = weights["stft.forward_basis_buffer"][:, 0].T.contiguous()  # [256, 2 * 129]
        self.input = weights["decoder.rnn.weight_ih"]
        self.hidden = weights["decoder.rnn.weight_hh"].T.contiguous()
        self.bias = weights["decoder.rnn.bias_ih"] + weights["decoder.rnn.bias_hh"]
        self.final = weights["decoder.decoder.2.weight"].view(1, CELL)
        self.final_bias = weights["decoder.decoder.2.bias"]

    def forward(
        self,
        samples: torch.Tensor,
        states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        ends: tuple[torch.Tensor, torch.Tensor],
        live: list[int],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """[N, 512] float32 in [-1, 1], the frames of B sequences one behind the other, those with the most
        frames first -> probabilities [N]; context [B, 64], hidden and cell [B, 128] after each one's last.

        states: context, hidden, cell before. ends: each sequence's first and last frame [B]. live: of each
        frame number, how many sequences have such a frame.
        """
        context, hidden, cell = states
        firsts, lasts = ends
        tails = samples[:, -self.context :]
        before = tails.roll(1, 0).index_copy_(0, firsts, context)
        gates = self.gates(torch.cat([before, samples], 1))
        if len(live) == 1:  # one frame each
            hidden, cell = self.advance(gates, hidden, cell)
            return self.probability(hidden), tails[lasts], hidden, cell
        hiddens = torch.empty([len(gates), self.cell], dtype=gates.dtype, device=gates.device)
        hidden, cell = hidden.clone(), cell.clone()
        for number, count in enumerate(live):
            at = firsts[:count] + number
            hidden[:count], cell[:count] = self.advance(gates[at], hidden[:count], cell[:count])
            hiddens[at] = hidden[:count]
        return self.probability(hiddens), tails[lasts], hidden, cell

    def gates(self, frames: torch.Tensor) -> torch.Tensor:
        """[N, 64 + 512] -> what the input adds to the cell's gates [N, 512]."""
        blocks: list[torch.Tensor] = []
        for block in torch.split(frames, self.block):
            padded = F.pad(block, [0, self.window // 4], "reflect")
            waves = (
                padded.unfold(1, self.window, self.hop).reshape(-1, self.window) @ self.stft
            )  # [4 N, 2 * 129]
            x = torch.hypot(waves[:, : self.bins], waves[:, self.bins :]).view(len(block), -1)  # [N, 4 * 129]
            for weight, bias in zip(self.layers, self.biases):  # noqa: B905 (TorchScript has no strict)
                x = F.linear(x, weight, bias).relu_()
            blocks.append(F.linear(x, self.input, self.bias))
        return torch.cat(blocks)

    def advance(
        self, gates: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of the LSTM cell: [B, 512], [B, 128], [B, 128] -> hidden and cell."""
        entry, forget, content, exit_ = torch.addmm(gates, hidden, self.hidden).chunk(4, 1)
        cell = forget.sigmoid() * cell + entry.sigmoid() * content.tanh()
        return exit_.sigmoid() * cell.tanh(), cell

    def probability(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, 128] -> [N]."""
        return F.linear(hidden.relu(), self.final, self.final_bias).sigmoid().squeeze(1)


def scripted(network: Network) -> Any:
    """TorchScript of it; to be run without optimised execution: each step has shapes of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.export can't take the loop over `live`
        return torch.jit.script(network.eval())


def _as_product(
    weights: Mapping[str, torch.Tensor], name: str, *, columns: int, stride: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A Conv1d of kernel 3 and padding 1 over a fixed number of columns, as one matrix.

    The first layer takes its columns as they come from the STFT: column by column, [4, channels].
    """
    kernel, bias = weights[f"{name}.reparam_conv.weight"], weights[f"{name}.reparam_conv.bias"]
    channels_out, channels_in, _ = kernel.shape
    columns_out = (columns - 1) // stride + 1
    matrix = kernel.new_zeros(columns_out, channels_out, columns, channels_in)
    for out in range(columns_out):
        for tap in range(3):
            column = out * stride + tap - 1
            if 0 <= column < columns:
                matrix[out, :, column] = kernel[:, :, tap]
    return matrix.reshape(columns_out * channels_out, -1), bias.repeat(columns_out)


class SileroVad:
    """A stream of little-endian int16, mono, 16 kHz -> {"t_s", "speech"} for each frame of 512 samples.

    t_s: the end of the frame, in seconds of the stream. /predict takes a WAV file and answers segments.
    path: a TorchScript file of silero-vad; None: the packaged one. Only its weights are used.
    """

    many_outputs = True
    one_item = True
    inputs = (("audio", "INT16", (-1,)),)
    outputs = (("speech", "FP32", (-1,)),)
    media_types = ("audio/wav", "audio/x-wav")  # the second is what Python and browsers guess for .wav
    item_key = "audio_b64"
    item_schema: ClassVar = {
        "type": "object",
        "properties": {"audio_b64": {"type": "string", "contentEncoding": "base64"}},
        "required": ["audio_b64"],
        "additionalProperties": False,
    }
    output_schema: ClassVar = {
        "type": "object",
        "properties": {
            "segments": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "start_s": {"type": "number", "minimum": 0},
                        "end_s": {"type": "number", "minimum": 0},
                    },
                    "required": ["start_s", "end_s"],
                    "additionalProperties": False,
                },
            }
        },
        "required": ["segments"],
        "additionalProperties": False,
    }

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def load(self, device: str) -> None:
        self._device = device
        self._network = scripted(Network(_read_weights(self.path or _packaged(), device)))

    # A stream

    def begin(self, request: None) -> dict[str, torch.Tensor]:
        """frame: how many there were; context: the last samples; hidden, cell: of the LSTM."""
        return {
            "frame": torch.zeros((), dtype=torch.int64),
            "context": torch.zeros(CONTEXT),
            "hidden": torch.zeros(CELL),
            "cell": torch.zeros(CELL),
        }

    def chunk(self, data: bytes) -> tuple[list[Frames], bytes]:
        """Whole frames, up to MAX_FRAMES in a chunk: int16 [F, 512]."""
        count = len(data) // (2 * FRAME)
        frames = np.frombuffer(data, "<i2", count * FRAME).reshape(count, FRAME)
        return [frames[i : i + MAX_FRAMES] for i in range(0, count, MAX_FRAMES)], data[2 * FRAME * count :]

    def last_chunk(self, rest: bytes) -> list[Frames]:
        if len(rest) % 2:
            raise ValueError(
                "the stream has an odd number of bytes, its last sample is cut in two: send 16-bit samples"
            )
        return self.chunk(rest.ljust(2 * FRAME, b"\0"))[0] if rest else []

    def step(
        self, states: dict[str, torch.Tensor], inputs: Sequence[Frames]
    ) -> tuple[dict[str, torch.Tensor], list[list[dict[str, float]]], list[bool]]:
        # The longest first, so that those with a frame number t are always the first `live[t]`.
        order = sorted(range(len(inputs)), key=lambda i: -len(inputs[i]))
        inputs = [inputs[i] for i in order]
        counts = [len(frames) for frames in inputs]
        ends = np.cumsum(counts)
        firsts = torch.from_numpy(ends - counts).to(self._device)
        lasts = torch.from_numpy(ends - 1).to(self._device)
        live = [bisect_left(counts, -number, key=neg) for number in range(counts[0])]
        rows = torch.tensor(order, device=self._device)
        samples = torch.from_numpy(np.concatenate(inputs)).to(self._device).float().div_(32768.0)  # [N, 512]
        before = (states["context"][rows], states["hidden"][rows], states["cell"][rows])
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined,unused-ignore]
            speech, context, hidden, cell = self._network(samples, before, (firsts, lasts), live)
        back = rows.argsort()
        speeches, frames_before = speech.tolist(), states["frame"].tolist()
        outputs: list[list[dict[str, float]]] = [[] for _ in inputs]
        for row, at, count in zip(order, (ends - counts).tolist(), counts, strict=True):
            frame = frames_before[row]
            outputs[row] = [_result(frame + i, speeches[at + i]) for i in range(count)]
        after = {
            "frame": states["frame"] + torch.tensor([len(part) for part in outputs], device=self._device),
            "context": context[back],
            "hidden": hidden[back],
            "cell": cell[back],
        }
        return after, outputs, [False] * len(inputs)

    # /predict

    def preprocess(self, item: Any) -> bytes:
        """A WAV's bytes, {"audio_b64": ...}, or int16 samples [n] at 16 kHz -> the bytes of a stream."""
        if not isinstance(item, np.ndarray):
            return read_wav(read_encoded(item, self.item_key, "a WAV file"))
        if item.dtype != np.int16 or item.ndim != 1:
            raise ValueError(f"audio must be INT16 of shape [n], one recording, got {list(item.shape)}")
        if not item.size:
            raise ValueError("audio holds no samples")
        return item.astype("<i2").tobytes()

    def postprocess(self, outputs: list[dict[str, float]]) -> dict[str, list[dict[str, float]]]:
        """A recording's frames -> its segments; one that reaches the end ends with the last, padded frame."""
        segments = find_segments([output["speech"] for output in outputs], frame=FRAME, rate=RATE)
        return {"segments": [{"start_s": a / RATE, "end_s": b / RATE} for a, b in segments]}

    def to_tensors(self, outputs: list[dict[str, float]]) -> dict[str, Any]:
        return {"speech": np.array([output["speech"] for output in outputs], np.float32)}

    def examples(self) -> list[dict[str, str]]:
        return [{"audio_b64": _sweep(first)} for first in (110.0, 190.0)]


def _result(frame: int, speech: float) -> dict[str, float]:
    # Six digits: 5e-7 off at most, and half the bytes on the wire.
    return {"t_s": (frame + 1) * FRAME / RATE, "speech": round(speech, 6)}


def _sweep(first_hz: float) -> str:
    """A quarter of a second of a rising harmonic tone, 8 bit at 8 kHz, as a WAV in base64: 2.7 kB."""
    t = np.arange(2000) / 8000
    phase = 2 * np.pi * first_hz * (t + t**2)
    wave = sum(np.sin(k * phase) / k for k in range(1, 8))
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.3 * wave, 8000, format="WAV", subtype="PCM_U8")
    return base64.b64encode(buffer.getvalue()).decode()


def _read_weights(file: str | Path, device: str) -> dict[str, torch.Tensor]:
    """Of the 16 kHz network, by TorchScript's names; the file's own code never runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the package has no other file of these weights
        module = torch.jit.load(str(file), map_location=device)  # type: ignore[no-untyped-call]
    prefix = "_model."
    return {
        n.removeprefix(prefix): w.detach() for n, w in module.state_dict().items() if n.startswith(prefix)
    }


def _packaged() -> Path:
    """The package itself is not imported: it would ask for torchaudio."""
    spec = importlib.util.find_spec("silero_vad")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the PyPI package silero-vad, which holds the weights, is not installed")
    return Path(spec.origin).parent / "data" / "silero_vad.jit"
