"""Messages of the Open Inference Protocol: an infer request to items, an answer to its response.

Owns: the request's shape, binding tensors to what the model declares, the binary layout of whole
messages. Must not know: routes, how an item is run. Sources: KServe's "Open Inference Protocol",
Triton's "Binary tensor data extension".
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from deployments.core.contract import Answer, ModelCard, TensorSpec
from deployments.core.errors import CallerError, MalformedRequest, ModelBroken, ServingError
from serve_app.http.body import is_size
from serve_app.http.exchange import Reply, encode_json
from serve_app.http.jsonio import Shape, decode, too_many_items
from serve_app.http.native import server_timing
from serve_app.http.tensors import (
    MAX_RANK,
    Header,
    Output,
    Rows,
    rows_from_json,
    rows_from_raw,
    stack_output,
    to_json,
    to_raw,
)

BINARY_MEDIA = "application/octet-stream"
MODEL_VERSION = "1"
HEADER_LENGTH = b"inference-header-content-length"


class TensorParameters(msgspec.Struct, frozen=True):
    """Of an input; what other servers put here besides is no concern of ours."""

    binary_data_size: int | None = None


class OutputParameters(msgspec.Struct, frozen=True):
    binary_data: bool | None = None
    classification: Any = None


class InputTensor(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    shape: list[int]
    datatype: str
    parameters: TensorParameters = TensorParameters()
    data: Any = None


class RequestedOutput(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    parameters: OutputParameters = OutputParameters()


class InferParameters(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """timeout: microseconds, 0 for none, as Triton has it."""

    timeout: float = 0
    priority: float = 0
    binary_data_output: bool = False


class InferRequest(msgspec.Struct, forbid_unknown_fields=True):
    inputs: list[InputTensor]
    id: str = ""
    parameters: InferParameters = InferParameters()
    outputs: list[RequestedOutput] = []


_REQUEST = msgspec.json.Decoder(InferRequest)
_REQUEST_SHAPE = Shape(InferRequest, parameters=InferParameters, inputs=InputTensor, outputs=RequestedOutput)


def read_request(body: bytes) -> InferRequest:
    return decode(_REQUEST, _REQUEST_SHAPE, body)


def wanted_outputs(request: InferRequest, declared: Mapping[str, TensorSpec]) -> dict[str, bool]:
    """Output name to whether it goes out binary: those asked for, or all."""
    as_binary = request.parameters.binary_data_output
    if not request.outputs:
        return dict.fromkeys(declared, as_binary)
    wanted: dict[str, bool] = {}
    for output in request.outputs:
        if output.name not in declared:
            raise _unknown_tensor("output", output.name, declared)
        if output.name in wanted:
            raise MalformedRequest(f"output '{output.name}' is asked for twice", param="outputs")
        if output.parameters.classification is not None:
            raise MalformedRequest("the classification extension is not offered", param="outputs")
        binary = output.parameters.binary_data
        wanted[output.name] = as_binary if binary is None else binary
    return wanted


def read_items(request: InferRequest, tail: memoryview, card: ModelCard, max_items: int) -> list[Any]:
    """One item a row of dimension 0: the row itself, or a dict where several inputs are declared.

    Where the card says `one_item`, the tensor as a whole.
    """
    headers = _headers(request.inputs, card, max_items)
    rows: dict[str, Rows] = {}
    at = 0
    for tensor, header in zip(request.inputs, headers, strict=True):
        size = tensor.parameters.binary_data_size
        if size is None:
            rows[header.name] = rows_from_json(header, tensor.data)
            continue
        if tensor.data is not None or not 0 <= size <= len(tail) - at:
            raise header.refuse(
                f"has `data` besides binary_data_size, or more than the {len(tail) - at} bytes"
                " that are left of the body"
            )
        rows[header.name] = rows_from_raw(header, tail[at : at + size])
        at += size
    if at != len(tail):
        raise MalformedRequest(f"{len(tail) - at} bytes of binary data belong to no input")
    names = [spec.name for spec in card.inputs]
    if len(names) == 1:
        only = rows[headers[0].name]
        return [only] if card.one_item else list(only)
    return [dict(zip(names, row, strict=True)) for row in zip(*(rows[name] for name in names), strict=True)]


def _headers(tensors: Sequence[InputTensor], card: ModelCard, max_items: int) -> list[Header]:
    """Every declared input exactly once, each as declared, all with the same number of items."""
    declared = {spec.name: spec for spec in card.inputs}
    headers: dict[str, Header] = {}
    for tensor in tensors:
        spec = declared.get(tensor.name)
        if spec is None:
            raise _unknown_tensor("input", tensor.name, declared)
        if tensor.name in headers:
            raise MalformedRequest(f"input '{tensor.name}' is there twice", param="inputs")
        headers[tensor.name] = _checked_header(tensor, spec, as_bytes=bool(card.media_types))
    missing = [name for name in declared if name not in headers]
    if missing:
        raise MalformedRequest(f"input '{missing[0]}' is missing", param="inputs")
    counts = {header.shape[0] for header in headers.values()}
    if len(counts) > 1:
        raise MalformedRequest("the inputs differ in dimension 0, the number of items")
    count = counts.pop()
    if count > max_items and not card.one_item:
        raise too_many_items(count, max_items, param="inputs")
    return list(headers.values())


def _unknown_tensor(kind: str, name: str, declared: Mapping[str, TensorSpec]) -> MalformedRequest:
    names = ", ".join(declared)
    return MalformedRequest(f"there is no {kind} {name[:80]!r}; there is {names}", param=f"{kind}s")


def divided(body: bytes, header_length: bytes | None) -> tuple[bytes, memoryview]:
    """The JSON head and the binary tail of a body; without the length all is head."""
    if header_length is None:
        return body, memoryview(b"")
    if not is_size(header_length) or int(header_length) > len(body):
        raise MalformedRequest(
            "Inference-Header-Content-Length must be the size of the JSON at the body's start",
            param="Inference-Header-Content-Length",
        )
    length = int(header_length)
    return body[:length], memoryview(body)[length:]


def _checked_header(tensor: InputTensor, spec: TensorSpec, *, as_bytes: bool) -> Header:
    header = Header(tensor.name, tensor.datatype, tuple(tensor.shape), as_bytes)
    if tensor.datatype != spec.datatype:
        raise header.refuse(f"datatype must be {spec.datatype}, not {tensor.datatype[:20]!r}")
    if not tensor.shape or len(tensor.shape) > MAX_RANK or min(tensor.shape) < 1:
        raise header.refuse("shape must be a list of numbers from 1 up, the first counts the items")
    if not _fits(tensor.shape, spec):
        raise header.refuse(f"shape must be {list(spec.shape)}, not {tensor.shape}")
    return header


def _fits(shape: Sequence[int], spec: TensorSpec) -> bool:
    """-1 takes any size. A numeric [-1] is what a class without `inputs` has: the model checks rows."""
    if spec.shape == (-1,) and spec.datatype != "BYTES":
        return True
    return len(shape) == len(spec.shape) and all(
        wanted in (-1, given) for given, wanted in zip(shape, spec.shape, strict=True)
    )


def raise_first_error(answer: Answer) -> None:
    """Where one item failed, all do: raise the first one's error, naming its place."""
    for index, outcome in enumerate(answer.outcomes):
        if outcome.error is not None:
            raise _placed(outcome.error, index, len(answer.outcomes))


def _placed(error: ServingError, index: int, count: int) -> ServingError:
    """A copy with the item's place: one error object may stand for items of several requests."""
    placed = _copied(error)
    if placed.param is None:
        placed.param = f"inputs[{index}]"
    if count > 1 and isinstance(placed, CallerError):
        placed.message = f"item {index}: {placed.message}"
    return placed


def _copied(error: ServingError) -> ServingError:
    """Without the constructor, which may take anything in a user's subclass (copy.copy calls it)."""
    twin = type(error).__new__(type(error), *error.args)
    twin.__dict__.update(error.__dict__)
    twin.__cause__ = error.__cause__
    return twin


def response_outputs(answer: Answer, wanted: Sequence[str], card: ModelCard) -> list[Output]:
    """The wanted outputs of all items, each as one tensor (of the only item where it is `one_item`)."""
    datatypes = {spec.name: spec.datatype for spec in card.outputs}
    values = [outcome.value for outcome in answer.outcomes]
    for value in values:
        if not isinstance(value, dict) or not all(name in value for name in wanted):
            raise ModelBroken("the model's outputs are not those it declares")
    outputs = [stack_output(name, datatypes[name], [value[name] for value in values]) for name in wanted]
    return [output.only_item() for output in outputs] if card.one_item else outputs


def infer_reply(
    head: dict[str, Any], outputs: Sequence[Output], wanted: Mapping[str, bool], answer: Answer
) -> Reply:
    """The response: JSON alone, or JSON with its length in a header and the binary tensors behind."""
    raw: list[bytes] = []
    tensors: list[dict[str, Any]] = []
    for output in outputs:
        tensor: dict[str, Any] = {
            "name": output.name,
            "datatype": output.datatype,
            "shape": list(output.shape),
        }
        if wanted[output.name]:
            raw.append(to_raw(output))
            tensor["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            tensor["data"] = to_json(output)
        tensors.append(tensor)
    encoded = encode_json(head | {"outputs": tensors})
    if not raw:
        return Reply(encoded, headers=[server_timing(answer)])
    length = (HEADER_LENGTH, b"%d" % len(encoded))
    return Reply(
        b"".join((encoded, *raw)),
        content_type=BINARY_MEDIA.encode(),
        headers=[length, server_timing(answer)],
    )
