"""Settings of data: which rows to read, and how they become prompts, examples or pairs."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from llmrl.data.files import SURROGATE
from llmrl.paths import UserPath
from llmrl.section import Bound, Section


@dataclass(frozen=True, kw_only=True)
class RowsConfig(Section):
    """Source of rows."""

    path: UserPath
    """A .jsonl, .json, .csv (each also with .gz) or .parquet file, or a data set on the hub such as openai/gsm8k."""
    subset: str | None = None
    """Configuration of a data set on the hub."""
    split: str = "train"
    """Split of a data set on the hub, which may be a part such as train[:10000]; a file has no splits."""
    num_rows: Annotated[int | None, Bound(least=1, way_out="leave it out to use every row")] = None
    """Uses only this many rows, from the start."""
    rename_columns: dict[str, str | None] = field(default_factory=dict)
    """New names of columns, as in {question: prompt}; null leaves a column out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise ValueError(f'{self.place}.path ("") must name a file or a data set on the hub')


@dataclass(frozen=True, kw_only=True)
class MixedRowsConfig(RowsConfig, place="data.mixed_with.<n>"):
    """Rows of another set, which become prompts or examples by the settings of `data`."""

    weight: Annotated[float, Bound(above=0)]
    """Weight in the mixture; that of the rows of `data.path` is 1."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(RowsConfig, place="data"):
    """Source of rows, and how they become prompts."""

    prompt_column: str = "prompt"
    """Column of the prompt: a text, or a list of messages with "role" and "content"."""
    system_prompt: str | None = None
    """System message put before the prompts that do not bring one. Needs a chat template."""
    template: Literal["auto", "chat", "none"] = "auto"
    """How a text becomes tokens: "chat" makes it the user's message in the tokenizer's chat template, "none" takes it
    as it is, "auto" is "chat" for a tokenizer that has a chat template and "none" for any other."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template, as in {enable_thinking: false} for Qwen3: names that the template reads. A reward
    model that reads prompts by a template of its own gets them too."""
    skip_bad_rows: bool = False
    """Drops and counts the rows that cannot be used; otherwise one of them refuses the file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.system_prompt is not None and SURROGATE.search(self.system_prompt):
            raise ValueError(f"data.system_prompt ({self.system_prompt!r}) is no Unicode text; write it as UTF-8")
        if self.template == "none" and self.system_prompt is not None:
            raise ValueError(
                'data.system_prompt needs a chat template, but data.template is "none"; '
                'set data.template to "chat" or put the system prompt into the prompts'
            )
        if self.template == "none" and self.chat_template_kwargs:
            raise ValueError(
                f"data.chat_template_kwargs ({', '.join(self.chat_template_kwargs)}) need a chat template, but "
                'data.template is "none"; set data.template to "chat" or leave them out'
            )


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(DataConfig):
    """Rows of one set, or of several in the shares of their weights."""

    mixed_with: tuple[MixedRowsConfig, ...] = ()
    """Other sets whose rows are mixed in, as in [{path: code.jsonl, weight: 0.5}]; each batch has each in its share."""


@dataclass(frozen=True, kw_only=True)
class PromptsConfig(DataConfig):
    """Rows of prompts."""

    max_prompt_tokens: Annotated[int, Bound(least=1)] = 512
    """Longer prompts are dropped and counted, never truncated."""


@dataclass(frozen=True, kw_only=True)
class ExamplesConfig(DataConfig):
    """Rows of prompts and responses. A prompt of messages that ends with the assistant's brings its own response."""

    response_column: str = "response"
    """Column of the response, a text."""
    max_tokens: Annotated[int, Bound(least=2, why="a prompt token and the EOS")] = 1024
    """Longer examples, prompt and response together, are dropped and counted, never truncated."""


@dataclass(frozen=True, kw_only=True)
class ConversationsConfig(ExamplesConfig):
    """Rows of prompts and responses, or of conversations."""

    train_on: Literal["last", "all"] = "last"
    """Turns of the assistant in a conversation that are learned: its last one, or all; the others are read only."""


@dataclass(frozen=True, kw_only=True)
class PromptDataConfig(MixtureConfig, PromptsConfig):
    """Rows of prompts to train on."""


@dataclass(frozen=True, kw_only=True)
class SupervisedDataConfig(MixtureConfig, ConversationsConfig):
    """Rows of prompts and responses to train on."""


@dataclass(frozen=True, kw_only=True)
class ScoredDataConfig(ExamplesConfig):
    """Rows of prompts, responses and the scores that these got."""

    score_column: str = "score"
    """Column of the score, a finite number."""


@dataclass(frozen=True, kw_only=True)
class PreferenceDataConfig(DataConfig):
    """Rows of preference pairs. Without the prompt column both sides begin with the prompt."""

    chosen_column: str = "chosen"
    """Column of the side that was preferred: a text, or messages."""
    rejected_column: str = "rejected"
    """Column of the other side, in the same form."""
    margin_column: str = "margin"
    """Column of how much better the chosen side is, 0 or greater; it may be missing."""
    source_column: str = "source"
    """Column of where a pair comes from, a text that the report card groups by; it may be missing."""
    max_tokens: Annotated[int, Bound(least=2, why="a prompt token and the EOS")] = 1024
    """Tokens of the prompt and the longer response together."""
    truncate: bool = False
    """Truncates responses of longer pairs, which then end without EOS; otherwise such pairs are dropped and counted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chosen_column == self.rejected_column:
            raise ValueError(
                f"data.chosen_column and data.rejected_column ({self.chosen_column}) must be two different columns"
            )
