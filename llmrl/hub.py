"""Names on the Hugging Face hub: what is one, and whether the hub has it.

The libraries ask a hub that does not answer again and again, for half a minute and more; so it is asked once before.
"""

from pathlib import Path

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
