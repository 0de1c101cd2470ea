"""Open Inference Protocol v2: metadata, JSON and binary tensors, and everything malformed."""

import base64
import gzip
import json
import struct
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest

from deployments.core.contract import Answer, Limits, Outcome, TensorSpec
from deployments.core.errors import InvalidItem
from serve_app.http.oip_messages import raise_first_error
from serve_app.http.tensors import (
    DATATYPES,
    NUMPY,
    Header,
    Output,
    rows_from_json,
    rows_from_raw,
    stack_output,
    to_json,
    to_raw,
)
from tests.http_fakes import PAIR_CARD, PICTURE_CARD, TEXT_CARD, FakeService, client_of, vector_of

TEXTS = {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]}
A = {"name": "a", "shape": [2, 2], "datatype": "FP32", "data": [[1, 2], [3, 4.5]]}
B = {"name": "b", "shape": [2], "datatype": "INT64", "data": [1, -9]}


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
async def client(service: FakeService) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(service) as client:
        yield client


async def infer(client: httpx.AsyncClient, *inputs: Any, model: str = "embed", **more: Any) -> httpx.Response:
    body = {"inputs": list(inputs), **more}
    return await client.post(f"/v2/models/{model}/infer", json=body)


async def post_binary(
    client: httpx.AsyncClient, head: Any, tail: bytes, model: str, **headers: str
) -> httpx.Response:
    encoded = json.dumps(head).encode()
    length = {"inference-header-content-length": str(len(encoded))}
    return await client.post(f"/v2/models/{model}/infer", content=encoded + tail, headers=length | headers)


async def test_metadata_tells_what_the_model_takes_and_gives(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v2")).json()["extensions"] == ["binary_tensor_data"]
    for path in ("/v2/models/embed", "/v2/models/embed/versions/1"):
        assert (await client.get(path)).json() == {
            "name": "embed",
            "versions": ["1"],
            "platform": "pytorch",
            "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
            "outputs": [{"name": "embedding", "datatype": "FP32", "shape": [-1, 4]}],
        }


async def test_ready_follows_the_service_and_live_does_not(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    paths = ("/v2/health/ready", "/v2/models/embed/ready", "/v2/models/embed/versions/1/ready")
    for ready, status in ((True, 200), (False, 503)):
        service.ready = ready
        for path in paths:
            answer = await client.get(path)
            assert (answer.status_code, answer.json()["ready"]) == (status, ready)
        assert (await client.get("/v2/health/live")).json() == {"live": True}


@pytest.mark.parametrize(
    "path", ["/v2/models/other", "/v2/models/other/infer", "/v2/models/embed/versions/2/infer"]
)
async def test_another_model_or_version_is_404(client: httpx.AsyncClient, path: str) -> None:
    method = "POST" if path.endswith("infer") else "GET"
    answer = await client.request(method, path, json={"inputs": [TEXTS]})
    assert answer.status_code == 404
    assert "embed" in answer.json()["error"]


async def test_texts_in_json_give_one_row_each(client: httpx.AsyncClient, service: FakeService) -> None:
    answer = await infer(client, TEXTS, id="42")
    assert answer.status_code == 200
    assert answer.headers["server-timing"].startswith("queue;dur=")
    body = answer.json()
    assert (body["model_name"], body["model_version"], body["id"]) == ("embed", "1", "42")
    (output,) = body["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("embedding", "FP32", [2, 4])
    assert output["data"] == [*vector_of("a"), *vector_of("b")]
    assert service.calls[0][0] == ["a", "b"]
    assert service.calls[0][1].as_tensors


async def test_two_inputs_become_one_dict_an_item_in_any_order() -> None:
    service = FakeService(PAIR_CARD)
    async with client_of(service) as client:
        answer = await infer(client, B, A, model="pair")
    outputs = {output["name"]: output for output in answer.json()["outputs"]}
    assert outputs["sum"]["data"] == [2, 3, -6, -4.5]
    assert outputs["sign"] == {
        "name": "sign",
        "datatype": "BOOL",
        "shape": [2],
        "data": [True, False],
    }
    item = service.calls[0][0][0]
    assert list(item) == ["a", "b"]
    assert item["a"].dtype == np.float32


async def test_only_the_outputs_asked_for_come_back() -> None:
    async with client_of(FakeService(PAIR_CARD)) as client:
        answer = await infer(client, A, B, model="pair", outputs=[{"name": "sign"}])
    assert [output["name"] for output in answer.json()["outputs"]] == ["sign"]


async def test_binary_tensors_go_in_and_come_out() -> None:
    a, b = np.array([[1, 2], [3, 4]], "<f4"), np.array([1, -9], "<i8")
    head = {
        "inputs": [
            {k: v for k, v in A.items() if k != "data"} | {"parameters": {"binary_data_size": 16}},
            {k: v for k, v in B.items() if k != "data"} | {"parameters": {"binary_data_size": 16}},
        ],
        "outputs": [{"name": "sum", "parameters": {"binary_data": True}}, {"name": "sign"}],
    }
    async with client_of(FakeService(PAIR_CARD)) as client:
        answer = await post_binary(client, head, a.tobytes() + b.tobytes(), "pair")
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers["inference-header-content-length"])
    outputs = json.loads(answer.content[:length])["outputs"]
    assert outputs[0]["parameters"] == {"binary_data_size": 16}
    assert "data" not in outputs[0]
    assert np.frombuffer(answer.content[length:], "<f4").tolist() == [2, 3, -6, -5]
    assert outputs[1]["data"] == [True, False]


async def test_binary_data_output_makes_all_outputs_binary(client: httpx.AsyncClient) -> None:
    answer = await infer(client, TEXTS, parameters={"binary_data_output": True})
    length = int(answer.headers["inference-header-content-length"])
    assert len(answer.content) - length == 2 * 4 * 4
    json_again = [{"name": "embedding", "parameters": {"binary_data": False}}]
    answer = await infer(client, TEXTS, parameters={"binary_data_output": True}, outputs=json_again)
    assert answer.headers["content-type"] == "application/json"


def packed(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(e)) + e for e in elements)


def binary_head(shape: list[int], size: int, name: str = "text") -> dict[str, Any]:
    tensor = {"name": name, "shape": shape, "datatype": "BYTES"}
    return {"inputs": [tensor | {"parameters": {"binary_data_size": size}}]}


async def test_images_are_bytes_and_base64_in_json() -> None:
    service = FakeService(PICTURE_CARD)
    image = b"\xff\xd8\x00"
    async with client_of(service) as client:
        tail = packed(image, b"")
        binary = await post_binary(client, binary_head([2], len(tail), "image"), tail, "classify")
        tensor = {"name": "image", "shape": [1], "datatype": "BYTES"}
        data = [base64.b64encode(image).decode()]
        as_json = await infer(client, tensor | {"data": data}, model="classify")
        broken = await infer(client, tensor | {"data": ["%"]}, model="classify")
    assert service.calls[0][0] == [image, b""]
    assert service.calls[1][0] == [image]
    labels = as_json.json()["outputs"][1]
    assert (labels["shape"], labels["data"]) == ([1, 2], ["3 bytes", "Käse"])
    assert binary.json()["outputs"][0]["data"] == [3, 0, 0, 0]
    assert broken.status_code == 400
    assert "base64" in broken.json()["error"]


@pytest.mark.parametrize(
    ("tail", "size", "says"),
    [
        (packed(b"a", b"b"), 9, "longer than the binary data left"),
        (packed(b"a"), 5, "1 elements"),
        (packed(b"a", b"b", b"c"), 15, "does not hold 2"),
        (packed(b"a", b"\xff"), 10, "not valid UTF-8"),
        (struct.pack("<I", 2**32 - 1) + b"a", 5, "longer than"),
        (packed(b"a", b"b"), 8, "does not hold 2"),
        (packed(b"a", b"b"), 11, "more than the 10 bytes"),
        (packed(b"a", b"b"), -1, "more than the 10 bytes"),
        (packed(b"a", b"b") + b"more", 10, "4 bytes of binary data belong to no input"),
    ],
)
async def test_a_binary_length_that_does_not_fit_is_400(
    client: httpx.AsyncClient, service: FakeService, tail: bytes, size: int, says: str
) -> None:
    answer = await post_binary(client, binary_head([2], size), tail, "embed")
    assert answer.status_code == 400
    assert says in answer.json()["error"]
    assert not service.calls


@pytest.mark.parametrize("length", ["-1", "x", "100000", "9" * 5000, "0" * 5000 + "1", ""])
async def test_a_header_length_that_does_not_fit_is_400(client: httpx.AsyncClient, length: str) -> None:
    answer = await client.post(
        "/v2/models/embed/infer",
        json={"inputs": [TEXTS]},
        headers={"inference-header-content-length": length},
    )
    assert answer.status_code == 400
    assert "Inference-Header-Content-Length" in answer.json()["error"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "txt"}, "no input 'txt'; there is text"),
        ({"datatype": "FP32"}, "datatype must be BYTES"),
        ({"datatype": "STRING"}, "datatype must be BYTES, not 'STRING'"),
        ({"shape": [3]}, "has 2 elements, but shape [3] needs 3"),
        ({"shape": []}, "shape must be"),
        ({"shape": [-1]}, "from 1 up"),
        ({"shape": [0]}, "from 1 up"),
        ({"shape": [2, 1]}, "shape must be [-1]"),
        ({"shape": [1] * 40}, "shape must be"),
        ({"shape": [1.5]}, "float"),
        ({"shape": "2"}, "array"),
        ({"data": "ab"}, "must be an array"),
        ({"data": None}, "must be an array"),
        ({"data": [1, 2]}, "must be strings"),
        ({"data": [["a"], ["b"]]}, "must be strings"),
        ({"data": []}, "has 0 elements"),
        ({"dtype": "BYTES"}, "unknown field 'dtype' in `inputs[0]`; allowed: name, shape"),
        ({"parameters": {"binary_data_size": 1}}, "besides binary_data_size"),
        ({"parameters": {"binary_data_size": "1"}}, "str"),
    ],
)
async def test_a_tensor_other_than_declared_is_400(
    client: httpx.AsyncClient, service: FakeService, change: dict[str, Any], says: str
) -> None:
    answer = await infer(client, TEXTS | change)
    assert answer.status_code == 400
    assert says in answer.json()["error"]
    assert not service.calls


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([], "input 'a' is missing"),
        ([A], "input 'b' is missing"),
        ([A, A], "there twice"),
        ([A, B | {"shape": [1], "data": [1]}], "differ in dimension 0"),
        ([A | {"shape": [2, 3]}, B], "shape must be [-1, 2], not [2, 3]"),
        ([A | {"shape": [2**62, 2]}, B | {"shape": [2**62]}], "max_items_per_request"),
        ([A | {"data": [[1, 2], [3]]}, B], "not nested as its shape"),
        ([A | {"data": [1, 2, [3], 4]}, B], "holds list"),
        ([A | {"data": [1, 2, 3, "4"]}, B], "holds str"),
        ([A | {"data": [1, 2, 3, True]}, B], "holds bool"),
        ([A | {"data": [1, 2, 3, None]}, B], "holds NoneType"),
        ([A | {"data": [1, 2, 3, 1e39]}, B], "out of the range of FP32"),
        ([A, B | {"data": [1, 2.0]}], "holds float, which INT64 can't be"),
        ([A, B | {"data": [1, 2**63]}], "out of the range of INT64"),
    ],
)
async def test_tensors_that_do_not_fit_together_are_refused(inputs: list[Any], says: str) -> None:
    service = FakeService(PAIR_CARD)
    async with client_of(service) as client:
        answer = await infer(client, *inputs, model="pair")
    assert answer.status_code == (413 if "max_items" in says else 400)
    assert says in answer.json()["error"]
    assert not service.calls


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"outputs": [{"name": "x"}]}, "no output 'x'; there is embedding"),
        ({"outputs": [{"name": "embedding"}] * 2}, "asked for twice"),
        (
            {"outputs": [{"name": "embedding", "parameters": {"classification": 2}}]},
            "classification extension is not offered",
        ),
        ({"parameters": {"time": 1}}, "allowed: timeout, priority, binary_data_output"),
        ({"parameters": {"timeout": -1}}, "over 0"),
        ({"parameters": {"priority": 99}}, "-10 to 10"),
        ({"id": 7}, "`id`"),
        ({"input": 7}, "unknown field 'input'; allowed: inputs, id, parameters, outputs"),
    ],
)
async def test_the_rest_of_a_request_is_checked_too(
    client: httpx.AsyncClient, more: dict[str, Any], says: str
) -> None:
    answer = await infer(client, TEXTS, **more)
    assert answer.status_code == 400
    assert says in answer.json()["error"]


async def test_timeout_is_in_microseconds_and_zero_is_none(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    await infer(client, TEXTS, parameters={"timeout": 2500, "priority": 1})
    await infer(client, TEXTS, parameters={"timeout": 0})
    assert (service.calls[0][1].timeout_ms, service.calls[0][1].priority) == (2.5, 1)
    assert service.calls[1][1].timeout_ms is None


async def test_one_bad_item_fails_the_list_with_the_first_error(client: httpx.AsyncClient) -> None:
    answer = await infer(client, TEXTS | {"data": ["a", "late"]})
    assert answer.status_code == 504
    answer = await infer(client, TEXTS | {"data": ["a", "poison"]})
    assert answer.status_code == 500
    assert "secret" not in answer.text


async def test_warnings_come_as_a_response_parameter(client: httpx.AsyncClient) -> None:
    body = (await infer(client, TEXTS | {"data": ["a", "long"]})).json()
    assert body["parameters"] == {"warnings": "item 1: cut at 256 tokens"}


async def test_compressed_binary_requests_count_the_length_uncompressed(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    head = json.dumps(binary_head([1], 5)).encode()
    answer = await client.post(
        "/v2/models/embed/infer",
        content=gzip.compress(head + packed(b"a")),
        headers={
            "content-encoding": "gzip",
            "inference-header-content-length": str(len(head)),
            "content-type": "application/octet-stream",
        },
    )
    assert answer.status_code == 200
    assert service.calls[0][0] == ["a"]


async def test_a_form_content_type_is_415(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/x-www-form-urlencoded"}
    answer = await client.post("/v2/models/embed/infer", content=b"{}", headers=headers)
    assert answer.status_code == 415
    assert "-H 'content-type" in answer.json()["error"]


async def test_a_class_that_declares_nothing_takes_rows_of_any_shape() -> None:
    card = replace(TEXT_CARD, inputs=(TensorSpec("input", "FP32", (-1,)),), embeds=False)
    service = FakeService(card)
    async with client_of(service) as client:
        tensor = {"name": "input", "datatype": "FP32", "shape": [1, 2, 2], "data": [1, 2, 3, 4]}
        await infer(client, tensor)
    assert service.calls[0][0][0].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("datatype", [d for d in DATATYPES if d not in ("BYTES", "BF16")])
def test_numbers_survive_json_and_raw(datatype: str) -> None:
    header = Header("x", datatype, (2, 3))
    values = [True, False] * 3 if datatype == "BOOL" else [0, 1, 2, 3, 100, 127]
    rows = rows_from_json(header, values)
    output = stack_output("x", datatype, list(rows))
    assert output.shape == (2, 3)
    assert to_json(output) == values
    raw = to_raw(output)
    assert len(raw) == 6 * NUMPY[datatype].itemsize
    again = np.array(rows_from_raw(header, memoryview(raw)))
    assert again.ravel().tolist() == values


def test_bf16_is_widened_in_and_rounded_to_even_out() -> None:
    header = Header("x", "BF16", (3,))
    raw = struct.pack("<3H", 0x3F80, 0xC000, 0x7FC0)
    rows = np.array(rows_from_raw(header, memoryview(raw)))
    assert rows[:2].tolist() == [1.0, -2.0]
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001], "<u4").view("<f4")
    assert to_raw(Output("x", "BF16", (3,), ties)) == struct.pack("<3H", 0x3F80, 0x3F82, 0x3F81)
    assert to_raw(Output("x", "BF16", (1,), rows[2:])) == struct.pack("<H", 0x7FC0)


@pytest.mark.parametrize("datatype", [d for d in DATATYPES if d != "BYTES"])
def test_raw_data_of_the_wrong_size_is_refused_for_every_datatype(datatype: str) -> None:
    with pytest.raises(Exception, match="binary_data_size is 3"):
        rows_from_raw(Header("x", datatype, (2**40, 2**40)), memoryview(b"abc"))


def test_a_raw_bool_is_zero_or_one() -> None:
    with pytest.raises(Exception, match="0 or 1"):
        rows_from_raw(Header("x", "BOOL", (1,)), memoryview(b"\x02"))


def test_bytes_of_more_dimensions_come_as_nested_rows() -> None:
    header = Header("x", "BYTES", (2, 2), as_bytes=False)
    assert rows_from_json(header, ["a", "b", "c", "d"]) == [["a", "b"], ["c", "d"]]


def test_outputs_that_differ_in_shape_are_the_callers_to_split() -> None:
    with pytest.raises(Exception, match="one item in a request"):
        stack_output("x", "FP32", [np.zeros(2), np.zeros(3)])


class _Picky(InvalidItem):
    """A user's own error, whose constructor takes something else."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__(f"{width} x {height} is too small")


def test_one_error_object_of_two_requests_keeps_their_places_apart() -> None:
    shared = _Picky(1, 2)
    shared.__cause__ = ValueError("why")
    said = []
    for outcomes in ([Outcome(), Outcome(error=shared)], [Outcome(error=shared), Outcome()]):
        with pytest.raises(InvalidItem) as caught:
            raise_first_error(Answer(outcomes))
        said.append((caught.value.param, caught.value.message))
        assert type(caught.value) is _Picky
        assert caught.value.__cause__ is shared.__cause__
    assert said == [
        ("inputs[1]", "item 1: 1 x 2 is too small"),
        ("inputs[0]", "item 0: 1 x 2 is too small"),
    ]
    assert (shared.param, shared.message) == (None, "1 x 2 is too small")


async def test_parameters_named_in_a_tensor_too_are_no_duplicate_and_cost_little() -> None:
    texts = ["x" * 100] * 200_000
    tensor = {"name": "text", "shape": [200_000], "datatype": "BYTES", "data": texts, "parameters": {}}
    service = FakeService(limits=Limits(max_items_per_request=10))
    async with client_of(service) as client:
        content = json.dumps({"inputs": [tensor], "parameters": {}}).encode()
        answer = await client.post("/v2/models/embed/infer", content=content)
        twice = b'{"parameters":{},' + content[1:]
        refused = await client.post("/v2/models/embed/infer", content=twice)
    assert answer.status_code == 413
    assert refused.status_code in (400, 413)
