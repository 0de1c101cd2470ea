"""Where a model's files are: a local folder, or a Hugging Face id fetched once into its cache.

Owns: which files may be fetched (weights as safetensors, JSON, vocabularies: never pickle, never
code) and the messages when something is missing.
"""

import json
import re
from pathlib import Path
from typing import Any

ALLOWED = ("*.json", "*.txt", "*.jinja", "model.safetensors", "model-*.safetensors")
"""Of a Hugging Face repository only these are fetched; nothing in them can run code."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find_folder(path: str | Path) -> Path:
    """Folder of a model: `path` itself, or the local snapshot of the Hugging Face id it names.

    Raises FileNotFoundError that says what was tried.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or not _HUB_ID.fullmatch(str(path)):
        raise FileNotFoundError(
            f"{path} is neither a folder nor a Hugging Face id such as sentence-transformers/all-MiniLM-L6-v2"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(ALLOWED)))
    except Exception as error:
        raise FileNotFoundError(
            f"{path} is no local folder, and as a Hugging Face id it can't be fetched: {error}"
        ) from error


def read_json(file: Path) -> Any:
    """Parsed content of a JSON file. Raises FileNotFoundError or ValueError, naming the file."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"the model's folder has no {file.name} ({file})") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
