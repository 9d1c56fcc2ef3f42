"""Records of training in a reward model's config.json: normalization of scores, and how texts became tokens."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig


MEAN_KEY, STD_KEY = "llmrl_score_mean", "llmrl_score_std"


TEMPLATE_KEY, SYSTEM_PROMPT_KEY = "llmrl_template", "llmrl_system_prompt"
ARGUMENTS_KEY = "llmrl_chat_template_kwargs"


@dataclass(frozen=True, kw_only=True)
class Normalization:
    """(score - mean) / std: mean 0 and standard deviation 1 on a reference set. Stored in the model's config.json."""

    mean: float
    std: float

    def __call__(self, scores: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        return (scores - self.mean) / self.std

    def write(self, config: "PretrainedConfig") -> None:
        """Stores both numbers in the config, where `saved_normalization` finds them."""
        setattr(config, MEAN_KEY, self.mean)
        setattr(config, STD_KEY, self.std)


def normalization_on(scores: Float[Tensor, " B"]) -> Normalization:
    """Normalization of these scores to mean 0 and standard deviation 1; equal scores are only centred.

    Raises:
        FloatingPointError: A score is not finite.
    """
    exact = scores.double()
    if not exact.isfinite().all():
        raise FloatingPointError(
            f"{int((~exact.isfinite()).sum())} of {len(exact)} scores of the trained reward model are not finite, so "
            "it is not saved; lower optimizer.learning_rate, or look in metrics.jsonl for where it began"
        )
    return Normalization(mean=float(exact.mean()), std=float(exact.std(correction=0)) or 1.0)


def saved_normalization(config: "PretrainedConfig") -> Normalization | None:
    """The normalization stored with a model; None for one that llmrl did not train."""
    mean, std = getattr(config, MEAN_KEY, None), getattr(config, STD_KEY, None)
    return None if mean is None or std is None else Normalization(mean=mean, std=std)


@dataclass(frozen=True, kw_only=True)
class TextForm:
    """How texts became tokens in training, by the settings of `data`. Stored in the model's config.json."""

    template: Literal["auto", "chat", "none"] = "auto"
    system_prompt: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def write(self, config: "PretrainedConfig") -> None:
        """Stores them in the config, where `saved_text_form` finds them."""
        setattr(config, TEMPLATE_KEY, self.template)
        setattr(config, SYSTEM_PROMPT_KEY, self.system_prompt)
        setattr(config, ARGUMENTS_KEY, self.chat_template_kwargs)


def saved_text_form(config: "PretrainedConfig") -> TextForm:
    """The text form stored with a model; the defaults of `data` for one that llmrl did not train."""
    arguments = getattr(config, ARGUMENTS_KEY, None)
    return TextForm(
        template=getattr(config, TEMPLATE_KEY, "auto"),
        system_prompt=getattr(config, SYSTEM_PROMPT_KEY, None),
        chat_template_kwargs=arguments if isinstance(arguments, dict) else {},
    )
