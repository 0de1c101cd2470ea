"""JSON Schemas of requests and answers, as true as a schema can be to what the readers accept.

Owns: the shapes that openapi.py puts together. Must not know: paths, statuses. What no schema can say
(an OIP tensor's `data` must have as many elements as its `shape` says) is in the descriptions.
"""

import math
from collections.abc import Mapping
from typing import Any

from deployments.core.contract import PRIORITY_RANGE, Limits, ModelCard, TensorSpec
from serve_app.http.tensors import DATATYPES, MAX_RANK

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
OPEN: Schema = {"type": "object"}


def closed(properties: Schema, *required: str) -> Schema:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def record(properties: Schema) -> Schema:
    """A closed object that has all its fields."""
    return closed(properties, *properties)


def array(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


_LOW, _HIGH = PRIORITY_RANGE
PRIORITY: Schema = {
    "type": "integer",
    "minimum": _LOW,
    "maximum": _HIGH,
    "default": 0,
    "description": "Lower numbers are served first.",
}
NATIVE_PARAMETERS = closed(
    {
        "timeout_ms": {
            "type": ["number", "null"],
            "exclusiveMinimum": 0,
            "description": "Not begun by then: 504. More than a day counts as a day.",
        },
        "priority": PRIORITY,
    }
)
NATIVE_ERROR = record(
    {
        "type": {"type": "string", "description": "Stable; switch on it."},
        "message": STRING,
        "param": {"type": ["string", "null"]},
        "request_id": STRING,
    }
)
PLACED = array(record({"index": INTEGER, "type": STRING, "message": STRING}))
OPENAI_ERROR = record(
    {
        "message": STRING,
        "type": STRING,
        "param": {"type": ["string", "null"]},
        "code": STRING,
        "request_id": STRING,
    }
)


def predict_request(card: ModelCard, limits: Limits) -> Schema:
    items = array(dict(card.item_schema), minItems=1, maxItems=limits.max_items_per_request)
    if card.examples:
        items["examples"] = [list(card.examples[:1])]
    return closed({"inputs": items, "parameters": NATIVE_PARAMETERS}, "inputs")


def form_request(limits: Limits) -> Schema:
    file: Schema = {"type": "string", "format": "binary"}
    files = array(file, minItems=1, maxItems=limits.max_items_per_request)
    return closed({"files": files, "parameters": NATIVE_PARAMETERS}, "files")


def predict_answer(card: ModelCard) -> Schema:
    outputs = array(dict(card.output_schema))
    return closed({"outputs": outputs, "warnings": PLACED}, "outputs")


def predict_failure() -> Schema:
    """The request failed as a whole (`error` alone), or some items did."""
    properties = {
        "error": NATIVE_ERROR,
        "outputs": {"type": "array", "description": "null in the failed places"},
        "errors": PLACED,
        "warnings": PLACED,
    }
    return closed(properties, "error")


def tensor_spec() -> Schema:
    return record({"name": STRING, "datatype": {"enum": list(DATATYPES)}, "shape": array(INTEGER)})


def infer_request(card: ModelCard, limits: Limits) -> Schema:
    count = len(card.inputs)
    names = {"enum": [spec.name for spec in card.outputs]}
    output = closed({"name": names, "parameters": OPEN}, "name")
    tensor = {"anyOf": [_input(spec, limits) for spec in card.inputs]}
    inputs = array(tensor, minItems=count, maxItems=count)
    inputs["examples"] = [[_tensor_example(spec, card) for spec in card.inputs]]
    return closed(
        {
            "id": STRING,
            "inputs": inputs,
            "outputs": array(output, uniqueItems=True),
            "parameters": closed(
                {
                    "timeout": {"type": "number", "minimum": 0, "description": "Microseconds."},
                    "priority": PRIORITY,
                    "binary_data_output": {"type": "boolean"},
                }
            ),
        },
        "inputs",
    )


def _input(spec: TensorSpec, limits: Limits) -> Schema:
    rank = len(spec.shape)
    dims: Schema = array({"type": "integer", "minimum": 1}, minItems=1, maxItems=MAX_RANK)
    if spec.shape != (-1,) or spec.datatype == "BYTES":
        dims["minItems"] = dims["maxItems"] = rank
    dims["description"] = (
        f"{list(spec.shape)}; the first counts the items (at most {limits.max_items_per_request})"
    )
    return closed(
        {
            "name": {"const": spec.name},
            "datatype": {"const": spec.datatype},
            "shape": dims,
            "data": {
                "type": "array",
                "description": "Row-major, flat or nested; left out where the tensor is binary.",
            },
            "parameters": OPEN,
        },
        "name",
        "datatype",
        "shape",
    )


def _tensor_example(spec: TensorSpec, card: ModelCard) -> Schema:
    """One item: the model's own example where it is a text or media, else zeros."""
    shape = [max(dim, 1) for dim in spec.shape]
    example = card.examples[0] if card.examples else None
    if isinstance(example, Mapping):
        example = example.get(card.item_key)
    value: object = 0
    if spec.datatype == "BYTES":
        value = example if isinstance(example, str) else ""
    elif spec.datatype == "BOOL":
        value = False
    data = [value] * math.prod(shape)
    return {"name": spec.name, "datatype": spec.datatype, "shape": shape, "data": data}


def infer_answer() -> Schema:
    output = closed(
        {
            "name": STRING,
            "datatype": {"enum": list(DATATYPES)},
            "shape": array(INTEGER),
            "data": {"type": "array"},
            "parameters": OPEN,
        },
        "name",
        "datatype",
        "shape",
    )
    properties = {
        "model_name": STRING,
        "model_version": STRING,
        "id": STRING,
        "parameters": OPEN,
        "outputs": array(output),
    }
    return closed(properties, "model_name", "model_version", "outputs")


def embedding_request(card: ModelCard, limits: Limits) -> Schema:
    texts = array(STRING, minItems=1, maxItems=limits.max_items_per_request)
    return closed(
        {
            "input": {"anyOf": [STRING, texts]},
            "model": {"const": card.name},
            "encoding_format": {"enum": ["float", "base64"], "default": "float"},
            "dimensions": {"enum": [card.outputs[0].shape[-1], None]},
            "user": {"type": ["string", "null"]},
        },
        "input",
        "model",
    )


def embedding_answer() -> Schema:
    vector = {"anyOf": [array(NUMBER), {"type": "string", "contentEncoding": "base64"}]}
    entry = record({"object": {"const": "embedding"}, "index": INTEGER, "embedding": vector})
    properties = {
        "object": {"const": "list"},
        "data": array(entry),
        "model": STRING,
        "usage": record({"prompt_tokens": INTEGER, "total_tokens": INTEGER}),
        "warnings": PLACED,
    }
    return closed(properties, "object", "data", "model", "usage")
