"""Objects that a program hands over, as what a recipe names.

Models and rows become files in ``given/`` of the output folder, named by a digest of their content: so a run reads the
same bits as on the command line, is known again by them, and can go on in another process. Functions and classes that
another process can import go by their name, such as ``package.module:function``; all others get a name ``given:...``.
"""

import hashlib
import inspect
import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, Union, runtime_checkable

from llmrl.api.folder import RunFolder
from llmrl.data.files import DataError
from llmrl.errors import Error
from llmrl.files import replace_file, writing
from llmrl.models.config import ModelConfig
from llmrl.models.digest import digest_of_model
from llmrl.models.folders import HUB_NAME, ModelError, has_vocabulary_file, is_adapter
from llmrl.models.saving import save_weights
from llmrl.roles import Collectives
from llmrl.user_code import GIVEN, name_of, names_code
from llmrl.wiring.process import private_files

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Model: TypeAlias = Union["PreTrainedModel", RunFolder, str, Path]
"""A model of transformers, what a run has left, a folder, or a name on the hub."""
Tokenizer: TypeAlias = Union["PreTrainedTokenizerBase", str, Path]
"""A tokenizer of transformers, its folder, or a name on the hub."""
Rows: TypeAlias = Union[Sequence[Mapping[str, Any]], "datasets.Dataset", "Frame", str, Path]
"""A list of dicts, a data set of `datasets`, a frame of pandas, a file, or a name on the hub."""


@runtime_checkable
class Frame(Protocol):
    """A frame of pandas, which need not be installed."""

    def to_dict(self, orient: Any) -> Any: ...


class Given:
    """What a program hands over to one run.

    Args:
        folder: Where the files go.
        collectives: Ranks that share them.
    """

    def __init__(self, folder: Path, collectives: Collectives) -> None:
        self.folder = folder
        self.collectives = collectives
        self.objects: dict[str, Any] = {}
        """Functions, classes and others by the name after ``given:``."""

    def model(self, model: Model, tokenizer: Tokenizer | None = None, *, argument: str = "model") -> str:
        """Folder or hub name of a model, which the first rank writes if it is an object.

        Raises:
            ModelError: It is no model, or has no tokenizer, or a second one.
        """
        if isinstance(model, RunFolder):
            model = model.folder / "final"
        if isinstance(model, str | Path):
            return str(model) if tokenizer is None else self._with_tokenizer(Path(model), tokenizer, argument)
        if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
            raise ModelError(
                f"{argument} is a {type(model).__name__}, no model; hand over a model of transformers, a folder or a "
                "name on the hub"
            )
        if hasattr(model, "peft_config"):
            raise ModelError(
                f"{argument} is an adapted model; hand over the folder of its adapter, which is continued, or "
                "model.merge_and_unload() with model.lora in settings"
            )
        if getattr(model, "is_quantized", False):
            raise ModelError(
                f"{argument} is quantized, and what is saved of it could not be trained; hand over the folder or the "
                "name that it was loaded from, with model.lora and model.quantization=nf4 in settings"
            )
        path = model.name_or_path
        return self._write(
            lambda: self._write_model(lambda new: _save(new, model), _tokenizer_of(tokenizer, path, argument), argument)
        )

    def _with_tokenizer(self, model: Path, tokenizer: Tokenizer, argument: str) -> str:
        """Folder of links to the files of a model, beside the tokenizer that its own folder lacks."""
        model = model.expanduser().absolute()
        if not model.is_dir() or has_vocabulary_file(str(model)) or is_adapter(str(model)):
            raise ModelError(
                f"tokenizer goes with a model that has none; {argument} ({model.name}) brings its own, so leave "
                "tokenizer out"
            )
        return self._write(
            lambda: self._write_model(lambda new: _link(new, model), _tokenizer_of(tokenizer, "", argument), argument)
        )

    def rows(self, rows: Rows, *, argument: str) -> str:
        """File or hub name of rows, which the first rank writes if they are objects.

        Raises:
            DataError: They are no rows, or hold what JSON cannot.
        """
        if isinstance(rows, str | Path):
            return str(rows)
        listed = as_dicts(rows, argument)
        content = "".join(f"{_line(row, number, argument)}\n" for number, row in enumerate(listed, start=1)).encode()
        file = self.folder / f"{argument}-{hashlib.sha256(content).hexdigest()[:8]}.jsonl"

        def write() -> Path:
            if not file.exists():
                with writing(self.folder):
                    self.folder.mkdir(parents=True, exist_ok=True)
                replace_file(file, content)
            return file

        return self._write(write)

    def code(self, code: Any, name: str | None = None, *, stays_here: bool = False) -> str:
        """Name of a function, class or other object: that by which another process can import it, unless it is to have
        another name, or stays in this process."""
        own = name_of(code) if callable(code) else ""
        if not stays_here and (name is None or own.rpartition(":")[2] == name) and _is_importable(code):
            return own
        base = name or own.rpartition(":")[2].rpartition(".")[2]
        base = base if base.isidentifier() else "function"
        names = [base, *(f"{base}_{number}" for number in range(2, len(self.objects) + 2))]
        free = next(each for each in names if self.objects.get(each, code) is code)
        self.objects[free] = code
        return f"{GIVEN}:{free}"

    def settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings with functions and classes by their names."""
        return {name: self.code(value) if callable(value) else value for name, value in settings.items()}

    def _write(self, write: Callable[[], Path]) -> str:
        """Path of what the first rank writes. Collective; where it fails, all raise."""
        path, failure = "", None
        if self.collectives.is_first:
            try:
                with private_files():
                    path = str(write())
            except Exception as error:  # the other ranks wait for it
                failure = error
        path, reason = self.collectives.from_first((path, None if failure is None else str(failure)))
        if failure is not None:
            raise failure
        if reason is not None:
            raise Error(reason)
        return path

    def _write_model(
        self, write_weights: Callable[[Path], None], tokenizer: "PreTrainedTokenizerBase", argument: str
    ) -> Path:
        new = self.folder / f".{argument}.new"
        shutil.rmtree(new, ignore_errors=True)
        with writing(self.folder):
            new.mkdir(parents=True)
            tokenizer.save_pretrained(new)
            write_weights(new)
            folder = self.folder / f"{argument}-{digest_of_model(ModelConfig(path=str(new)))[:8]}"
            if folder.exists():
                shutil.rmtree(new)
            else:
                new.rename(folder)
        return folder


def as_dicts(rows: Any, argument: str) -> list[Mapping[str, Any]]:
    """Rows of any form but that of a file."""
    library = type(rows).__module__.partition(".")[0]
    if library == "pandas" and hasattr(rows, "to_dict"):
        return [{name: None if _is_missing(x) else x for name, x in row.items()} for row in rows.to_dict("records")]
    if library == "datasets" and hasattr(rows, "to_list"):
        return rows.to_list()
    if not isinstance(rows, list | tuple) or not all(isinstance(row, Mapping) for row in rows):
        way_out = "name one of its splits" if isinstance(rows, Mapping) else "hand over a list of dicts"
        raise DataError(
            f"{argument} is a {type(rows).__name__}, no list of rows; {way_out}, such as [{{'prompt': '1+1='}}], a "
            "datasets.Dataset, a pandas.DataFrame or a file"
        )
    return list(rows)


def _is_missing(value: Any) -> bool:
    """Whether a cell of a frame is empty, for which pandas has several values."""
    return (isinstance(value, float) and math.isnan(value)) or type(value).__name__ in ("NAType", "NaTType")


def _line(row: Mapping[str, Any], number: int, argument: str) -> str:
    try:
        return json.dumps(dict(row), default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{argument}: row {number} cannot be written as JSON: {error}; hand over texts, numbers, lists and dicts"
        ) from error


def _plain(value: Any) -> Any:
    """Python's own value of a number or array of numpy or torch."""
    if type(value).__module__.partition(".")[0] in ("numpy", "torch") and hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is in it")


def _save(folder: Path, model: "PreTrainedModel") -> None:
    """Writes a model, and the name on the hub that it was loaded by."""
    save_weights(folder, model)
    if getattr(model.config, "_commit_hash", None):  # set for what comes from the hub, and for no folder
        (folder / HUB_NAME).write_text(str(model.name_or_path))


def _link(folder: Path, model: Path) -> None:
    """Links to the files of a model that are not in the folder already, as those of its tokenizer are."""
    for file in model.iterdir():
        if file.is_file() and not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())


def _tokenizer_of(tokenizer: Tokenizer | None, model_path: str | None, argument: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    if tokenizer is not None and not isinstance(tokenizer, str | Path):
        return tokenizer
    source = str(tokenizer or model_path or "")
    try:
        if not source:
            raise ValueError("the model does not know where it was loaded from")
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{argument} brings no tokenizer that can be found ({str(error).splitlines()[0]}); hand it over with its "
            "tokenizer, or save both to a folder and name that"
        ) from error


def _is_importable(code: Any) -> bool:
    """Whether another process finds a function or class by its module and name, and the same one: not what stands in
    the program itself, in a notebook or in another function."""
    if not (inspect.isfunction(code) or inspect.isclass(code)) or not names_code(name_of(code)):
        return False
    module = sys.modules.get(code.__module__)
    is_file = code.__module__ != "__main__" and getattr(module, "__file__", None) is not None
    return is_file and getattr(module, code.__qualname__, None) is code
