"""Digest of a model's files: the same for a copy of a folder, another for any other weights.

Small files count whole. Of a large one count its size and blocks that are spread evenly over it, so that a model of any
size takes a moment; a file that was trained further differs everywhere, and a byte between two blocks goes unseen.
"""

import hashlib
from pathlib import Path

from llmrl.hub import is_local
from llmrl.models.config import ModelConfig
from llmrl.models.folders import base_of_adapter, is_adapter

SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py")
"""Suffixes of the files that a model or its tokenizer is read from."""
WHOLE_BYTES = 1 << 26
"""Bytes up to which a file is read whole."""
NUM_BLOCKS = 256
BLOCK_BYTES = 1 << 16


def digest_of_model(config: ModelConfig) -> str:
    """SHA-256 of a folder's files and, of an adapter, of its base model's; of a name on the hub its commit."""
    if not is_local(config.path):
        return _commit(config.path)
    digest = _digest_of_files(Path(config.path).expanduser())
    if is_adapter(config.path):
        digest.update(digest_of_model(base_of_adapter(config)).encode())
    return digest.hexdigest()


def digest_of_files(folder: Path) -> str:
    """SHA-256 of the files of a folder from which a model is read."""
    return _digest_of_files(folder).hexdigest()


def _digest_of_files(folder: Path) -> "hashlib._Hash":
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file()):
        digest.update(f"{file.name}\n{digest_of_file(file)}\n".encode())
    return digest


def digest_of_file(file: Path) -> str:
    """SHA-256 of a file, or, where it is larger than `WHOLE_BYTES`, of its size and of `NUM_BLOCKS` blocks of it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= WHOLE_BYTES:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for number in range(NUM_BLOCKS):
            stream.seek(number * (size - BLOCK_BYTES) // (NUM_BLOCKS - 1))
            digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()


def _commit(name: str) -> str:
    """Commit of a model in the hub's local cache; empty where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name, "config.json")
    return Path(file).parent.name if isinstance(file, str) else ""
