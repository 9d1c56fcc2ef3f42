"""What a run has left in its output folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl.api.guest import quiet
from llmrl.files import read_object
from llmrl.lines import read_entries
from llmrl.trainers.output import RunError, is_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RunFolder:
    """The output folder of a run, which may be under way, done or stopped.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser().absolute()
        """The output folder."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r})"

    @property
    def config(self) -> dict[str, Any]:
        """Content of config.json: ``settings`` resolved, digests of what the run reads, versions, git state.

        Raises:
            RunError: There is none, or it is damaged.
        """
        config = read_object(self.folder / "config.json")
        if config is None:
            raise RunError(
                f"{self.folder / 'config.json'} is missing or damaged, so the settings of the run are not known"
            )
        return config

    @property
    def metrics(self) -> list[dict[str, int | float]]:
        """A row for each iteration with its number as ``iteration``, 0 for the evaluation before the first; as
        ``pandas.DataFrame(run.metrics)`` takes them. A number that was not finite is NaN. Lines that a crash has torn
        are left out, and of several of one iteration all but the last."""
        rows = {entry["iteration"]: entry for entry in read_entries(self.folder / "metrics.jsonl")}
        return [{name: float("nan") if x is None else x for name, x in row.items()} for _, row in sorted(rows.items())]

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Some responses of each iteration, with prompt, score, its parts and advantage."""
        return read_entries(self.folder / "samples.jsonl")

    @property
    def model(self) -> "PreTrainedModel":
        """The trained model, loaded anew from final/: a causal language model of transformers, or a classifier with one
        label where the run trained a reward model.

        Raises:
            RunError: The run has saved no model yet, or trained a critic, which transformers does not load whole.
        """
        return load_model(self._final)

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer of the trained model, from final/."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._final)

    @property
    def _final(self) -> Path:
        final = self.folder / "final"
        if not (final / "config.json").is_file():
            raise RunError(f"{final} holds no model: the run has not come to its end; let it go on by its train()")
        return final


def load_run(folder: str | Path) -> RunFolder:
    """What a run has left: its settings, metrics, samples and model.

    Args:
        folder: The output folder of a run of the command line or of Python.

    Raises:
        RunError: No run of llmrl made the folder.
    """
    run = RunFolder(folder)
    if not run.folder.is_dir():
        raise RunError(f"{folder} is no folder; name the output folder of a run")
    if not is_run(run.folder) and not (run.folder / "metrics.jsonl").is_file():
        raise RunError(f"{folder} holds no run of llmrl; name the folder that run.output_dir named")
    return run


def load_model(folder: Path) -> "PreTrainedModel":
    """The model in a folder that a run has saved."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from llmrl.models.critic_folder import VALUE_HEAD

    if (folder / VALUE_HEAD).is_file():
        raise RunError(
            f"{folder} holds a critic, a trunk with a value head, and no language model; name it in the setting "
            "critic.path of PPO, or load its trunk with AutoModel of transformers, and its head from "
            f"{VALUE_HEAD}"
        )
    names = (read_object(folder / "config.json") or {}).get("architectures") or [""]
    is_reward_model = names[0].endswith("ForSequenceClassification")
    kind = AutoModelForSequenceClassification if is_reward_model else AutoModelForCausalLM
    with quiet():
        return kind.from_pretrained(folder)
