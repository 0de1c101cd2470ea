"""Items that are a file's bytes: as a raw body, or in base64 in JSON.

Owns: reading either, and the sentences when it is neither. Must not know: formats, models.
"""

import base64
import binascii
from typing import Any


def read_encoded(item: Any, key: str, what: str) -> bytes:
    """The bytes of `item`, or of {key: base64}. ValueError names `what` was expected ("a WAV file")."""
    if isinstance(item, bytes):
        return item
    if not isinstance(item, dict) or set(item) != {key}:
        raise ValueError(f'expected {{"{key}": "..."}} or the bytes of {what}')
    text = item[key]
    if not isinstance(text, str):
        raise ValueError(f"{key} must be a string of base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{key} is not valid base64: {error}") from None
