"""A folder with a tiny model, a tiny reward model, data, rules and a recipe for each command: all in order."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
SPECIAL = ("<end>", "<pad>", "<system>", "<user>", "<assistant>")
RULES = "def score(responses, answer):\n    return [len(r) / 10 for r in responses]\n"
COMMANDS = ("sft", "reward-model", "grpo", "ppo", "evaluate", "score", "generate")


@dataclass
class Workspace:
    """The folder that a command runs in, and what is said on its command line."""

    folder: Path
    command: str
    overrides: list[str] = field(default_factory=list)
    dry: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def data(self) -> Path:
        """The file whose rows the command reads."""
        name = {"sft": "examples", "reward-model": "pairs", "score": "examples"}.get(self.command, "prompts")
        return self.folder / f"{name}.jsonl"

    @property
    def model(self) -> Path:
        """The model that the command is about."""
        return self.folder / ("reward" if self.command == "score" else "model")

    def arguments(self) -> list[str]:
        """What follows `llmrl`."""
        match self.command:
            case "score":
                return ["score", "reward", "examples.jsonl"]
            case "generate":
                return ["generate", "model", "What is 1+1?", "--max-response-tokens", "4"]
            case "evaluate":
                return ["evaluate", "grpo.yaml", *self.overrides]
        dry = ["--dry-run"] if self.dry else []
        return [self.command, f"{self.command}.yaml", *self.overrides, *dry]

    def edit(self, file: str, change) -> None:
        """Changes what a JSON file of the model's folder holds."""
        path = self.model / file
        content = json.loads(path.read_text())
        path.write_text(json.dumps(change(content)))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate([*SPECIAL, *alphabet])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[2:])})
    tokenizer.chat_template = CHAT
    return tokenizer


def make_template(folder: Path) -> None:
    """Everything in order, to be copied for each combination of faults."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(shape).save_pretrained(folder / "model")
    shape.num_labels = 1
    LlamaForSequenceClassification(shape).save_pretrained(folder / "reward")
    for name in ("model", "reward"):
        tokenizer.save_pretrained(folder / name)
    prompts = [{"prompt": f"What is {n}+1?", "answer": str(n + 1)} for n in range(6)]
    write_rows(folder / "prompts.jsonl", prompts)
    write_rows(folder / "examples.jsonl", [{**row, "response": f"It is {row['answer']}."} for row in prompts])
    pairs = [{"prompt": row["prompt"], "chosen": f"It is {row['answer']}.", "rejected": "No."} for row in prompts]
    write_rows(folder / "pairs.jsonl", pairs)
    (folder / "rules.py").write_text(RULES)
    for command, recipe in recipes().items():
        (folder / f"{command}.yaml").write_text(yaml.safe_dump(recipe))


def write_rows(file: Path, rows: list) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipes() -> dict[str, dict]:
    """The recipe of each command that has one."""
    model, run = {"path": "model"}, {"output_dir": "out", "num_iterations": 1}
    sampled = {
        "model": model,
        "data": {"path": "prompts.jsonl"},
        "evaluation_data": {"path": "prompts.jsonl"},
        "reward": {"functions": [{"name": "rules.py:score"}]},
        "rollout": {"prompts_per_iteration": 2, "max_response_tokens": 4, "max_rows": 8},
        "algorithm": {"group_size": 2},
        "update": {"minibatch_size": 4},
        "run": run,
    }
    return {
        "sft": {"model": model, "data": {"path": "examples.jsonl"}, "sft": {"batch_size": 2}, "run": run},
        "reward-model": {
            "model": model,
            "data": {"path": "pairs.jsonl"},
            "evaluation_data": {"path": "pairs.jsonl"},
            "reward_model": {"batch_size": 4},
            "run": {"output_dir": "out"},
        },
        "grpo": sampled,
        "ppo": {**sampled, "algorithm": {}, "rollout": {**sampled["rollout"], "prompts_per_iteration": 4}},
    }
