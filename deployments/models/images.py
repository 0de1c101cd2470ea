"""Encoded images to square RGB pixels: decoding that a hostile file can't break.

Owns: which formats are taken, the limits, EXIF orientation, cropping and resizing. Must not know:
the network. Every refusal is a ValueError whose text says what to change. Any thread may call it;
Pillow releases the GIL while it decodes.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

MAX_PIXELS = 50_000_000
"""Decoded, 50 megapixels are 150 MB; a file of a few kB can claim a hundred times as many."""

_CROP = 224 / 256
"""Share of the shorter side that is kept: TF's evaluation crop pads 224 by 32."""

Opener = Callable[[io.BytesIO], ImageFile.ImageFile]


def decode_square(data: bytes, size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """JPEG, PNG or WebP -> uint8 [size, size, 3], the centre as the photographer saw it.

    Raises ValueError for other formats, damaged files and more than MAX_PIXELS.
    """
    image = _open(data)
    width, height = image.size
    if width * height > MAX_PIXELS:
        limit = MAX_PIXELS // 1_000_000
        raise ValueError(f"the image is {width}x{height}, over the limit of {limit} megapixels")
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
        return _opener_of(data)(io.BytesIO(data))
    except MemoryError:
        raise
    except Exception as error:
        text = str(error) or type(error).__name__
        raise ValueError(f"not a JPEG, PNG or WebP image: {text}") from error


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
