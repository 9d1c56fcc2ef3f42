"""Makes prompts for reinforcement learning from preference pairs such as HH-RLHF: each prompt once, as chat messages.

    python data/hh/prompts.py [--pairs Anthropic/hh-rlhf] [--split train] [--out data/hh]

`--pairs` is a data set on the hub or a file, in any form that `llmrl reward-model` reads.
"""

import argparse
import json
import sys
from pathlib import Path

from llmrl.data.config import PreferenceDataConfig
from llmrl.data.files import DataError
from llmrl.data.preferences import parse_preferences, read_preference_rows


def prompts_of(config: PreferenceDataConfig) -> list[str]:
    """The distinct prompts of the pairs as lines of JSON, in data order."""
    pairs, _ = parse_preferences(read_preference_rows(config), config)
    return list(dict.fromkeys(json.dumps({"prompt": pair.prompt}) for pair in pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes prompts from preference pairs.")
    parser.add_argument("--pairs", default="Anthropic/hh-rlhf", help="data set on the hub, or file")
    parser.add_argument("--split", default="train", help="split of a data set on the hub")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write prompts.jsonl to")
    arguments = parser.parse_args()
    lines = prompts_of(PreferenceDataConfig(path=arguments.pairs, split=arguments.split))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{arguments.out / 'prompts.jsonl'}: {len(lines)} prompts")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {error}; --pairs names a data set on the hub or a file")
