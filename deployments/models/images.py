"""Encoded images to square RGB pixels: decoding that a hostile file can't break.

Owns: which formats are taken, the limits, EXIF orientation, cropping and resizing. Must not know:
the network. Every refusal is a ValueError whose text says what to change. Any thread may call it;
Pillow releases the GIL while it decodes.
"""

import io
import re
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

MAX_PIXELS = 50_000_000
"""Decoded, 50 megapixels are 150 MB; a file of a few kB can claim a hundred times as many."""

MAX_PIXEL_SCANS = 250_000_000
"""Pixels times scans of a JPEG. A scan is a pass over all pixels and may be 10 bytes long: 0.8 to 2 ns
a pixel, so half a second at most. Encoders write 10 scans: room for 25 megapixels progressive; a
baseline JPEG has one scan and is bound by MAX_PIXELS alone."""

MAX_PARTS = 50_000
"""Reads of a file, which Pillow's header loops do one or more a chunk or a byte of filling: 16 MiB of
4-byte segments would hold the GIL for 20 s. 16 MiB of PNG in chunks of 4 kB takes 16,000."""

_CROP = 224 / 256
"""Share of the shorter side that is kept: TF's evaluation crop pads 224 by 32."""

Opener = Callable[[io.BytesIO], ImageFile.ImageFile]


def decode_square(data: bytes, size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """JPEG, PNG or WebP -> uint8 [size, size, 3], the centre as the photographer saw it.

    Raises ValueError for other formats, damaged files and what is over MAX_PIXELS or MAX_PIXEL_SCANS.
    """
    image = _open(data)
    width, height = image.size
    if width * height > MAX_PIXELS:
        limit = MAX_PIXELS // 1_000_000
        raise ValueError(f"the image is {width}x{height}, over the limit of {limit} megapixels")
    if isinstance(image, JpegImageFile):
        _check_scans(data, width, height)
    try:
        orientation = _decode(image, size)
        square = _upright(_resize(_to_8_bit(image), size), orientation)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise ValueError(f"the image is damaged: {str(error) or type(error).__name__}") from error
    return np.array(square)


def _open(data: bytes) -> ImageFile.ImageFile:
    """Read the header. The readers are called directly: Image.open would warn of large sizes."""
    try:
        return _opener_of(data)(_CountedFile(data))
    except MemoryError:
        raise
    except Exception as error:
        text = str(error) or type(error).__name__
        raise ValueError(f"not a JPEG, PNG or WebP image: {text}") from error


class _CountedFile(io.BytesIO):
    """A file that can be read MAX_PARTS times."""

    _reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads += 1
        if self._reads > MAX_PARTS:
            raise ValueError(f"it has over {MAX_PARTS:,} parts: save it anew")
        return super().read(size)


def _check_scans(data: bytes, width: int, height: int) -> None:
    most = MAX_PIXEL_SCANS // (width * height)
    if data.count(b"\xff\xda") <= most:  # never fewer than its scans, and counted in no time
        return
    scans = count_scans(data)
    if scans > most:
        raise ValueError(
            f"the image is {width}x{height} in {scans} scans, over the limit of "
            f"{MAX_PIXEL_SCANS // 1_000_000} megapixels times scans: save it as a baseline "
            "(not progressive) JPEG, or smaller"
        )


def count_scans(data: bytes) -> int:
    """Scans of a JPEG up to its end, as libjpeg meets them (ITU-T T.81, annex B).

    Thumbnails lie inside of segments and are not counted, nor is what follows the image. Raises
    ValueError for what would take longer than 0.2 s: over MAX_PARTS segments, or as many FF FF.
    """
    scans, at = 0, 2
    if data.count(b"\xff\xff") > MAX_PARTS:  # filling; the search stops at each
        raise ValueError("the image is damaged: it is mostly filling")
    for _ in range(MAX_PARTS):
        found = _MARKER.search(data, at)
        if found is None or found[1] == b"\xd9":  # end of image
            return scans
        scans += found[1] == b"\xda"
        # The segment: its length counts itself.
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    raise ValueError(f"the image is damaged: it has over {MAX_PARTS:,} segments")


_MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")
"""Of what has a segment, and the end. In entropy-coded data FF is followed by 00 or by D0 to D7."""


def _opener_of(data: bytes) -> Opener:
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImageFile
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImageFile
    if not data:
        raise ValueError("it is empty")
    head = data[:256].lstrip().lower()
    if head.startswith((b"<svg", b"<?xml", b"<!doctype")):
        raise ValueError("it is an SVG or another XML text")
    raise ValueError("its first bytes are of none of them")


def _decode(image: ImageFile.ImageFile, size: int) -> int:
    """Decode in place; returns the EXIF orientation (1: upright).

    A JPEG much larger than needed is decoded at 1/2, 1/4 or 1/8 by its own transform.
    """
    # Twice the side that the crop needs keeps the probabilities to 0.01; see the tests.
    wanted = 2 * round(size / _CROP)
    image.draft(image.mode, (wanted, wanted))
    image.load()
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


def _to_8_bit(image: Image.Image) -> Image.Image:
    """RGB, or RGBA where there is transparency."""
    if image.mode.startswith("I"):  # 16-bit grey
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        return image.convert("RGBA")
    return image.convert("RGB")


def _resize(image: Image.Image, size: int) -> Image.Image:
    """Centre crop and bicubic resize in one pass; transparency is laid on white."""
    side = min(image.size) * _CROP
    left, top = ((extent - side) / 2 for extent in image.size)
    square = image.resize(
        (size, size),
        Image.Resampling.BICUBIC,
        box=(left, top, left + side, top + side),
        reducing_gap=3.0,
    )
    if square.mode == "RGBA":
        white = Image.new("RGBA", square.size, "white")
        square = Image.alpha_composite(white, square).convert("RGB")
    return square


def _upright(square: Image.Image, orientation: int) -> Image.Image:
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    # The crop is centred exactly, so turning the small square equals turning the photo.
    return square.transpose(turns[orientation]) if orientation in turns else square
