"""A folder in which the commands of the pages run: the repository's files, made data, tiny models under the names that
the pages use, also those of the hub, and the files of users that pages speak of."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.docs.pages import ROOT

LINKED = ("benchmarks", "constraints.txt", "docs", "Makefile", "pyproject.toml", "recipes", "reward_models", "tests")
"""What commands read and none changes."""
CHARS, CHAT, WORDS = "tiny_char_llama", "tiny_chat_llama", "tiny_word_llama"
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}assistant:"
POLICIES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": CHARS,
    "runs/quickstart/sft/final": CHARS,
    "runs/quickstart/grpo/final": CHARS,
    "runs/mine/final": CHARS,
    "runs/guessing/sft/final": CHAT,
    "runs/guessing/grpo/final": CHAT,
    "runs/products/sft/final": CHAT,
    "runs/products/grpo/final": CHAT,
    "runs/products/without_tool/final": CHAT,
    "runs/reviews_tiny/sft/final": WORDS,
    "runs/reviews_tiny/ppo/final": WORDS,
}
SCORERS = {
    "runs/hh_smollm2_reward_model/final": CHARS,
    "runs/reviews_tiny/reward_model/final": WORDS,
    "runs/my_reward_model/final": WORDS,
}
QUESTIONS = [{"question": f"{a} plus {b}?", "answer": str(a + b)} for a in range(6) for b in range(5)]
CHATS = [{"prompt": [{"role": "user", "content": row["question"]}]} for row in QUESTIONS]
EXAMPLES = [{"prompt": row["question"], "response": row["answer"]} for row in QUESTIONS]
SCORED = [{**row, "score": float(n % 3)} for n, row in enumerate(EXAMPLES)]
PAIRS = [{"prompt": row["question"], "chosen": row["answer"], "rejected": f"{row['answer']}0"} for row in QUESTIONS]
FILES = {
    "problems.jsonl": QUESTIONS,
    "held_out.jsonl": QUESTIONS[:4],
    "examples.jsonl": EXAMPLES,
    "held_out_examples.jsonl": EXAMPLES[:4],
    "pairs.jsonl": PAIRS,
    "held_out_pairs.jsonl": PAIRS[:8],
    "responses.jsonl": EXAMPLES[:3],
    "scored.jsonl": SCORED,
    "scored_test.jsonl": SCORED[:4],
    "first300.jsonl": PAIRS,
    "last200.jsonl": PAIRS[:8],
    "data/hh/prompts.jsonl": CHATS,
    "secrets.jsonl": [{"secret": number} for number in range(1, 33)],
}
NUM_ROWS = 64
CURVE = "benchmarks/results/word_problems_smollm2_h100.jsonl"
MEASURED = ("runs/mine/metrics.jsonl", "runs/word_problems_smollm2_grpo/metrics.jsonl")
"""Metrics of runs that pages draw."""


def make_data(folder: Path) -> None:
    """The first rows of what the generators of data/ write."""
    for name in ("arithmetic", "guessing", "products", "reviews", "word_problems"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["generate.py", "--out", str(folder / name)])
            runpy.run_path(str(ROOT / "data" / name / "generate.py"), run_name="__main__")
    for path in folder.glob("*/*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:NUM_ROWS]))


def make_model(path: Path, kind: str, *, scores: bool) -> None:
    """A tiny model with random weights; the stand-in for one of the hub has a chat template and long sequences."""
    source = ROOT / "recipes" / "models" / kind
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = AutoConfig.from_pretrained(source)
    if "smollm2" in str(path).lower() or "mine" in path.parts:
        tokenizer.chat_template, config.max_position_embeddings = TEMPLATE, 2048
    tokenizer.save_pretrained(path)
    if scores:
        config.num_labels = 1
    torch.manual_seed(0)
    (AutoModelForSequenceClassification if scores else AutoModelForCausalLM).from_config(config).save_pretrained(path)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workshop")
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    ignored = shutil.ignore_patterns("*.jsonl", "__pycache__")
    shutil.copytree(ROOT / "data", folder / "data", ignore=ignored)
    make_data(folder / "data")
    for path, kind in POLICIES.items():
        make_model(folder / path, kind, scores=False)
    for path, kind in SCORERS.items():
        make_model(folder / path, kind, scores=True)
    for name, rows in FILES.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in MEASURED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(ROOT / CURVE)
    return folder
