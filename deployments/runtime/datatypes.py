"""The Open Inference Protocol's datatypes, as numpy knows them.

Owns: the table. Must not know: torch, tensors' meaning, HTTP (its wire forms are in serve_app/http).
Source: KServe, "Open Inference Protocol", tensor data types.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

NUMPY_TYPES: Mapping[str, Any] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BF16": np.float32,  # numpy has none; nothing is lost in float32
}

DATATYPES = frozenset({*NUMPY_TYPES, "BYTES"})
"""All names; BYTES are str or bytes, which no numpy type holds well."""
