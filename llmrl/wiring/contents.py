"""What a run is known again by, in its config.json: every setting, and digests of what it reads."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmrl.batches import Row
from llmrl.config import AnyRun, PPORun, RLRun
from llmrl.data.source import fingerprint
from llmrl.environments.config import EnvironmentConfig
from llmrl.environments.hosting import Host
from llmrl.models.config import ModelConfig
from llmrl.models.critic_folder import ADAPTER
from llmrl.models.digest import digest_of_files, digest_of_model
from llmrl.secrets import masked
from llmrl.settings import to_dict
from llmrl.user_code import code_files, is_given, load_object, names_code, source_text
from llmrl.wiring.precision import with_dtypes
from llmrl.wiring.rows import EVALUATION

OWN = Path(__file__).resolve().parents[1]
"""The code of llmrl itself, which its version stands for."""


def recorded_settings(config: AnyRun) -> dict[str, Any]:
    """Every setting as it is recorded: resolved, secrets masked."""
    return masked(to_dict(with_dtypes(config)))


def contents_of(
    config: AnyRun,
    *,
    rows: Sequence[Row] | None,
    evaluation_rows: Sequence[Row] | None,
    functions: Sequence[Callable[..., Any]],
    host: Host | None = None,
) -> dict[str, str]:
    """SHA-256 of what a run reads, by the setting that names it: rows, models, code of the user; that of environments
    and tools as the host has loaded it."""
    contents = {"model.path": digest_of_model(config.model)}
    for section, read in (("data", rows), (EVALUATION, evaluation_rows)):
        if read is not None:
            contents[section] = fingerprint(read)
    if isinstance(config, PPORun) and config.critic.path is not None:
        contents["critic.path"] = _digest_of_critic(config.critic.path)
    if isinstance(config, RLRun):
        if config.reward.model is not None:
            scorer = ModelConfig(path=config.reward.model.path, trust_remote_code=config.model.trust_remote_code)
            contents["reward.model.path"] = digest_of_model(scorer)
        named = {f"reward.functions.{n}": each.name for n, each in enumerate(config.reward.functions)}
        code = dict(zip(named, functions, strict=True)) if functions else {}
        for name, value in vars(config.algorithm).items():
            if isinstance(value, str) and names_code(value):
                named[f"algorithm.{name}"] = value
                code[f"algorithm.{name}"] = load_object(value, role=f"algorithm.{name}")
        contents |= {name: _digest_of_code(named[name], function) for name, function in code.items()}
        if config.environment is not None and host is not None:
            contents |= _digests_of_host(config.environment, host)
    return contents


def _digests_of_host(config: EnvironmentConfig, host: Host) -> dict[str, str]:
    named = {"environment.name": config.name, **{f"environment.tools.{n}": name for n, name in enumerate(config.tools)}}
    digests = {}
    for setting, name in named.items():
        if name is None:
            continue
        files = {file: digest for file, digest in host.code[name].items() if not file.is_relative_to(OWN)}
        text = source_text(load_object(name, role=setting)) if is_given(name) else str(sorted(files.values(), key=str))
        digests[setting] = hashlib.sha256(text.encode()).hexdigest()
    return digests


def _digest_of_critic(path: str) -> str:
    """Digest of a critic's files and, where it is one, of its adapter's."""
    adapter = Path(path).expanduser() / ADAPTER
    folders = [path, str(adapter)] if adapter.is_dir() else [path]
    digests = [digest_of_files(Path(folder).expanduser()) for folder in folders]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _digest_of_code(name: str, function: Callable[..., Any]) -> str:
    digest = hashlib.sha256()
    if is_given(name):
        digest.update(source_text(function).encode())
        return digest.hexdigest()
    for file in code_files(function):
        if not file.is_relative_to(OWN):
            digest.update(file.read_bytes())
    return digest.hexdigest()
