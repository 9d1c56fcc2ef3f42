"""An episode to be read."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from llmrl.batches import Rollout, StopReason
from llmrl.messages import counted

ENDS = {
    StopReason.EOS: "done",
    StopReason.LENGTH: "truncated by environment.max_turn_tokens or rollout.max_response_tokens",
    StopReason.TURNS: "truncated by environment.max_turns",
}


def episode_text(rollout: Rollout, row: int) -> str:
    """What the actor of a response read, after ``> ``, what it wrote, and in the last line how the episode ended."""
    episodes = rollout.episodes
    assert episodes is not None, "an environment answered the rollout"
    opening, failure = episodes.openings[row], episodes.failure(row)
    if not opening:  # and what the actor wrote after nothing is no turn
        return f"({failure}: no reward)"
    opened = [{"role": "user", "content": opening}] if isinstance(opening, str) else opening
    lines = [line for message in (*opened, *episodes.messages[row]) for line in _lines(message)]
    reward = round(float(episodes.turn_rewards[row].sum() + episodes.end_reward[row]), 6) + 0.0  # not -0
    end = f"{ENDS.get(StopReason(int(rollout.stop_reason[row])))}, reward {reward:.4g}"
    if failure is not None:
        end = f"{failure}: no reward"
    return "\n".join([*lines, f"({counted(int(episodes.num_turns[row]), 'turn')}; {end})"])


def _lines(message: Mapping[str, Any]) -> Iterator[str]:
    role, content = message["role"], message["content"]
    if role != "assistant":
        yield f"> {content}" if role == "user" else f"> {role}: {content}"
        return
    calls = [call["function"] for call in message.get("tool_calls", ())]
    if content or not calls:
        yield content
    for call in calls:
        given = json.dumps(call["arguments"], ensure_ascii=False)
        yield f"{call['name']}({given})" if call["name"] else "(a call that cannot be read)"
