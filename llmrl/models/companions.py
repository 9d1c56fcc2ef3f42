"""Files beside the weights in a saved folder: settings, generation settings, tokenizer.

Whatever could read the folder that training started from can read the saved one, servers with transformers 4.57 too,
although transformers 5 writes rotary settings in another place and other names of tokenizer classes. So the files of
tokenizer and generation settings are the original ones, and config.json has both forms.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl.hub import is_local
from llmrl.models.folders import VOCABULARY_FILES, ModelError
from llmrl.models.loading import PLAIN_FORWARD, reason_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
NOT_KEPT = ("auto_map", "dtype", "torch_dtype", "quantization_config", "transformers_version")
"""Settings of the original config.json that are not copied: transformers writes them, or omits them for a reason."""


class Companions:
    """Companion files of a model and its tokenizer, read by the constructor: the source may be deleted later."""

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        read_from, tokens_from = model.config.name_or_path, tokenizer.name_or_path
        self.settings = _json(_read(read_from, "config.json"))
        self.generation = _read(read_from, "generation_config.json")
        files = {name: _read(tokens_from, name) for name in (*TOKENIZER_FILES, *VOCABULARY_FILES)}
        self.tokenizer_files = {name: content for name, content in files.items() if content is not None}

    def try_out(
        self, model: "PreTrainedModel", adapted: "PeftModel | None", tokenizer: "PreTrainedTokenizerBase"
    ) -> None:
        """Writes everything except the weights to a temporary folder.

        Raises:
            ModelError: It cannot be written, as it will have to be after training.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            try:
                model.config.save_pretrained(folder)
                if adapted is not None:
                    adapted.peft_config["default"].save_pretrained(name)
                self.write(folder, model)
                self.write_tokenizer(folder, tokenizer)
            except OSError:
                raise
            except Exception as error:  # transformers and peft refuse in classes of their own
                raise ModelError(
                    f"model.path ({model.config.name_or_path}) could not be saved after training: {reason_of(error)}; "
                    "mend its settings, or choose another model"
                ) from error

    def write(self, folder: Path, model: "PreTrainedModel") -> None:
        """Writes the original generation settings, and config.json in both forms, over what transformers wrote."""
        if self.generation is not None and model.can_generate():
            (folder / "generation_config.json").write_bytes(self.generation)
        file = folder / "config.json"
        settings = in_both_forms(json.loads(file.read_text()), self.settings)
        file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")

    def write_tokenizer(self, folder: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Writes the original tokenizer files; only the pad token may have changed."""
        tokenizer.save_pretrained(folder)
        for name, content in self.tokenizer_files.items():
            (folder / name).write_bytes(content)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            file = folder / name
            if file.is_file():
                settings = _readable_tokenizer(json.loads(file.read_text(encoding="utf-8")), tokenizer)
                file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def in_both_forms(saved: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json that transformers 5 writes, with the settings that older readers look for added.

    Args:
        saved: The config.json that transformers wrote.
        source: The config.json that training started from; its settings that `saved` lacks are kept.
    """
    kept = {
        name: value
        for name, value in source.items()
        if name not in saved and name not in NOT_KEPT and not name.startswith("_")
    }
    both = _rope_of_old(saved) | kept | saved
    if "dtype" in saved:
        both["torch_dtype"] = saved["dtype"]
    for name in PLAIN_FORWARD:
        if name in source:
            both[name] = source[name]
    for name, part in saved.items():
        if isinstance(part, dict) and name.endswith("_config"):
            both[name] = in_both_forms(part, source.get(name) or {})
    return both


def _rope_of_old(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings where transformers 4 reads them: those of full attention, and the base of windows."""
    rope = saved.get("rope_parameters") or {}
    full, windows = rope.get("full_attention", rope), rope.get("sliding_attention") or {}
    old = {name: full[name] for name in ("rope_theta", "partial_rotary_factor") if name in full}
    if full.get("rope_type", "default") != "default":
        old["rope_scaling"] = {name: value for name, value in full.items() if name not in old}
    if "rope_theta" in windows:
        old["rope_local_base_freq"] = windows["rope_theta"]
    return old


def _readable_tokenizer(settings: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Settings of a tokenizer with its current pad token, and no class or list that transformers 4 does not know."""
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := settings.get("extra_special_tokens"), list):
        del settings["extra_special_tokens"]
        settings["additional_special_tokens"] = extra
    pad = settings.get("pad_token")
    if (pad["content"] if isinstance(pad, dict) else pad) != tokenizer.pad_token:
        settings["pad_token"] = tokenizer.pad_token
    return settings


def _read(source: str | None, name: str) -> bytes | None:
    """A file of a folder, or of the local cache of the hub; None where there is none."""
    from huggingface_hub import try_to_load_from_cache

    if not source:
        return None
    file = Path(source) / name if is_local(source) else try_to_load_from_cache(source, name)
    return Path(file).read_bytes() if isinstance(file, str | Path) and Path(file).is_file() else None


def _json(content: bytes | None) -> dict[str, Any]:
    return {} if content is None else json.loads(content)
