"""The Hugging Face hub: which names are of it, whether it has them, and what is published there.

The libraries ask a hub that does not answer again and again, for half a minute and more; so it is asked once before.
"""

from collections.abc import Sequence
from pathlib import Path

from llmrl.errors import Error

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
TIMEOUT_S = 5.0
"""For the hub to say whether it has a name that is not in the local cache."""


def is_local(path: str, *, suffixes: tuple[str, ...] = ()) -> bool:
    """Whether a path means a file or a folder of this machine; anything else is a name on the hub.

    Such a name has no dot, slash or tilde in front, none of the suffixes, and at most one slash, and what stands before
    that is no folder here.
    """
    owner, slash, _ = path.partition("/")
    in_a_folder_here = slash != "" and Path(owner).is_dir()
    explicit = path.startswith(("/", ".", "~")) or path.endswith(suffixes) or path.count("/") > 1
    return explicit or in_a_folder_here or Path(path).exists()


def ask_for_model(name: str) -> None:
    """Raises OSError where a model is not in the local cache, and the hub does not have it or cannot be reached."""
    from huggingface_hub import HfApi, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().get_hf_file_metadata(url=hf_hub_url(name, "config.json"), timeout=TIMEOUT_S)
    except Exception as error:  # errors of the network come in the classes of whichever client the hub's library uses
        raise OSError(str(error)) from error


def ask_for_dataset(name: str) -> None:
    """Raises OSError where a data set is not in the local cache, and the hub does not have it or cannot be reached."""
    from datasets.load import CachedDatasetModuleFactory
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(name, timeout=TIMEOUT_S)
    except Exception as error:  # see `ask_for_model`
        try:
            CachedDatasetModuleFactory(name).get_module()
        except FileNotFoundError:
            raise OSError(str(error)) from error


class HubError(Error, RuntimeError):
    """The hub refused what was to be published, or cannot be reached."""


def push_folder(folder: Path, repo: str, *, private: bool, left_out: Sequence[str] = ()) -> str:
    """Uploads a folder to a model repository of the hub, which is made if it is not there. Returns its address.

    Args:
        folder: The folder; files of that name in the repository are replaced, others stay.
        repo: Name of the repository, as in owner/name.
        private: Whether a new repository is seen by its owner alone; else what is usual for the owner.
        left_out: Folders in it that are not uploaded.

    Raises:
        HubError: With the reason and, where a token is refused, how to get one.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if get_token() is None:
        raise HubError(f"no token of the hub: {LOG_IN}")
    try:
        made = HfApi().create_repo(repo, private=private or None, exist_ok=True)
        HfApi().upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message=f"Upload {folder.name} of a run of llmrl",
            ignore_patterns=[f"{name}/*" for name in left_out],
        )
    except HFValidationError as error:
        raise HubError(f"REPO ({repo}) is no name of a repository, such as owner/name: {error}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = f"; {LOG_IN}" if status in (401, 403) else ""
        raise HubError(f"the hub refused to take {repo} ({status}): {error.server_message or error}{hint}") from error
    except Exception as error:  # see `ask_for_model`
        raise HubError(f"{repo} could not be uploaded: {error}") from error
    return str(made)
