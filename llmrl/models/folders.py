"""Model folders, by their files alone: which folder a path means, whether it is complete, and what its JSON says."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llmrl.errors import Error
from llmrl.files import LFS_POINTER, read_object
from llmrl.hub import is_local
from llmrl.models.config import ModelConfig

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
CODE_FILES = ("config.json", "tokenizer_config.json")
"""Files that may name Python code that comes with a model."""
JSON_FILES = (*CODE_FILES, "generation_config.json", "special_tokens_map.json")
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.model",
)
"""Vocabulary files, one of which has the tokens of a tokenizer."""
HUB_NAME = "hub_name"
"""File in the folder of a model that a program handed over: the name on the hub by which that was loaded."""
MAX_HEADER_BYTES = 100_000_000
"""Bytes of the largest header that safetensors reads."""


class ModelError(Error, ValueError):
    """A model that cannot be used, and what to do about it."""


def resolved(path: str) -> str:
    """Absolute path of a folder, so that a saved reference to it is valid from anywhere; a hub name unchanged."""
    return str(Path(path).expanduser().absolute()) if is_local(path) else path


def adapters_on_folders(folder: Path) -> list[str]:
    """Adapters in a folder whose base is a folder of this machine, by their paths in it: of no use anywhere else."""
    found = []
    for file in sorted(folder.rglob("adapter_config.json")):
        base = (read_object(file) or {}).get("base_model_name_or_path")
        if isinstance(base, str) and is_local(base):
            found.append(str(file.parent.relative_to(folder)))
    return found


def same_model(left: str, right: str) -> bool:
    """Whether two paths mean the same folder, or are the same name on the hub."""
    if is_local(left) and is_local(right):
        return Path(left).expanduser().resolve() == Path(right).expanduser().resolve()
    return left == right


def hub_name(path: str) -> str:
    """Name on the hub by which the model of a folder was loaded, where a program handed that over; else the path."""
    file = Path(path).expanduser() / HUB_NAME
    return file.read_text() if file.is_file() else path


def is_adapter(path: str) -> bool:
    """Whether a folder holds a peft adapter rather than a whole model."""
    return (Path(path).expanduser() / "adapter_config.json").is_file()


def find_folder(path: str) -> Path:
    """The folder that a path means.

    Raises:
        ModelError: There is none, or it holds no model. The message names the folder that was probably meant.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        raise ModelError(f"model.path ({path}) is a file; name the folder that it lies in: {folder.parent}")
    if not folder.is_dir():
        near = neighbour(path)
        hint = f"did you mean {near}?" if near else "give a folder or a hub name"
        raise ModelError(f"model.path ({path}) is no folder; {hint}")
    if (folder / "state.safetensors").is_file() and (folder / "manifest.json").is_file():
        run = folder.absolute().parent.parent
        raise ModelError(
            f"model.path ({path}) is a checkpoint, which only a run with run.output_dir={run} reads; name a "
            f"saved model, such as {run / 'final'}"
        )
    if is_adapter(path) or _describes_model(folder):
        return folder
    inner = next((sub for sub in _folders_in(folder) if is_adapter(str(sub)) or _describes_model(sub)), None)
    if inner is not None:
        raise ModelError(f"model.path ({path}) holds no model, but a folder in it does; did you mean {inner}?")
    if (folder / "checkpoints").is_dir():
        raise ModelError(
            f"model.path ({path}) is the folder of a run that has saved no model yet; let it end, or name another model"
        )
    return folder


def neighbour(path: str) -> str | None:
    """The existing folder whose path is most similar to one that does not exist; None where none is similar."""
    here = Path()
    parts = Path(path).expanduser().parts
    for number, part in enumerate(parts):
        if (here / part).is_dir():
            here /= part
            continue
        names = [sub.name for sub in _folders_in(here)]
        for near in get_close_matches(part, names, n=3):
            candidate = here.joinpath(near, *parts[number + 1 :])
            if candidate.is_dir():
                return str(candidate)
        return None
    return None


def _folders_in(folder: Path) -> list[Path]:
    """Folders in it, the last model of a run first, then its best one."""
    first = ("final", "best")
    inner = [sub for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith(".")]
    return sorted(inner, key=lambda sub: (first.index(sub.name) if sub.name in first else len(first), sub.name))


def _describes_model(folder: Path) -> bool:
    """Whether its config.json is a model's, or cannot be read: a run has a config.json too."""
    file = folder / "config.json"
    if not file.is_file():
        return False
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return True
    return not (isinstance(settings, dict) and "settings" in settings and "model_type" not in settings)


def json_object(file: Path, path: str) -> dict[str, Any]:
    """Content of a JSON file of the model folder.

    Raises:
        ModelError: It is no JSON object.
    """
    refuse_pointer(file, path)
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ModelError(f"model.path ({path}) has a {file.name} that is no JSON object; save the model again")
    return settings


def refuse_pointer(file: Path, path: str) -> None:
    """Refuses a Git LFS pointer, which stands in place of a file that was not fetched."""
    with file.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ModelError(
                f"model.path ({path}) has a {file.name} that is a Git LFS pointer, not the file itself; run "
                "`git lfs pull` in the folder"
            )


def weight_files(folder: Path, path: str) -> list[Path]:
    """The files with a model's weights, each there and as long as its header says; empty where it has none.

    Raises:
        ModelError: One is missing, truncated or something else.
    """
    whole, index = (folder / name for name in WEIGHT_FILES)
    if whole.is_file():
        files = [whole]
    elif index.is_file():
        files = [folder / name for name in indexed_files(index, path)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ModelError(
                f"model.path ({path}) lacks {len(missing)} of the {len(files)} files that its {index.name} names, such "
                f"as {missing[0]}; fetch or copy the whole folder"
            )
    else:
        files = []
    for file in files:
        check_safetensors(file, path)
    return files


def indexed_files(index: Path, path: str) -> list[str]:
    """Names of the weight files that an index names.

    Raises:
        ModelError: It names none, or one that is not a safetensors file of its own folder: such a file would be read as
            a pickle, or from anywhere on this machine.
    """
    names = json_object(index, path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"model.path ({path}) has a {index.name} without a weight_map; save the model again")
    files = sorted({str(name) for name in names.values()})
    for name in files:
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise ModelError(
                f"model.path ({path}) has a {index.name} that names {name!r}, which is no safetensors file in the same "
                "folder; save the model again, as safetensors"
            )
    return files


def check_safetensors(file: Path, path: str) -> None:
    """Refuses a file that is not safetensors, or is shorter than its header says."""
    refuse_pointer(file, path)
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        raw = stream.read(header_bytes) if header_bytes <= min(size, MAX_HEADER_BYTES) else b""
    try:
        header = json.loads(raw)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError):
        raise ModelError(
            f"model.path ({path}) has a {file.name} that is no safetensors file; fetch or save it again"
        ) from None
    promised = 8 + header_bytes + max(ends, default=0)
    if size < promised:
        raise ModelError(
            f"model.path ({path}) has a {file.name} of {size:,} bytes, but its header promises {promised:,}: it is "
            "truncated; fetch or copy it again"
        )


def check_vocabulary_file(folder: Path, path: str) -> None:
    """Refuses a folder without a vocabulary file, for which transformers may make up an empty tokenizer."""
    files = [folder / name for name in VOCABULARY_FILES if (folder / name).is_file()]
    if not files:
        raise ModelError(
            f"model.path ({path}) holds no tokenizer (none of {', '.join(VOCABULARY_FILES[:3])}, ...); copy those of "
            "the model that it was made from, or save them with tokenizer.save_pretrained"
        )
    for file in files:
        refuse_pointer(file, path)


def has_vocabulary_file(path: str) -> bool:
    """Whether a folder has the tokens of a tokenizer."""
    return any((Path(path).expanduser() / name).is_file() for name in VOCABULARY_FILES)


@contextmanager
def reading_files(path: str) -> Iterator[None]:
    """Context in which an error of the file system is raised as a `ModelError` about the path."""
    try:
        yield
    except OSError as error:
        raise ModelError(f"model.path ({path}) cannot be read: {error.strerror or error}: {error.filename}") from error


def base_of_adapter(config: ModelConfig) -> ModelConfig:
    """The base model that an adapter's folder names: a path from the current folder, else from the adapter's folder.

    Raises:
        ModelError: The folder does not name one.
    """
    folder = Path(config.path).expanduser()
    base = json_object(folder / "adapter_config.json", config.path).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ModelError(f"model.path ({config.path}) is an adapter that does not name its base model")
    if not Path(base).expanduser().exists() and (folder / base).is_dir():
        base = str(folder / base)
    return ModelConfig(path=base, quantization=config.quantization, trust_remote_code=config.trust_remote_code)
