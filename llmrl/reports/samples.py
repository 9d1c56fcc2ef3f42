"""Some responses of every iteration, to be read: samples.jsonl."""

import json
from collections.abc import Callable

import torch

from llmrl.batches import Episodes, Experience, Rollout, Row, StopReason
from llmrl.functional.masking import masked_mean
from llmrl.lines import LineFile


class SampleWriter:
    """Appends a few responses of an experience, evenly spread over it, with their scores and the mean advantage of
    their tokens."""

    def __init__(self, lines: LineFile, *, num_samples: int, decode: Callable[[list[int]], str]) -> None:
        self.lines = lines
        self.num_samples = num_samples
        self.decode = decode

    def __call__(self, iteration: int, experience: Experience) -> None:
        """Writes samples of the iteration that is under way: `iteration` are done."""
        if not self.num_samples:
            return
        num_responses = len(experience.rollout.rows)
        chosen = torch.linspace(0, num_responses - 1, min(self.num_samples, num_responses)).long().tolist()
        self.lines.append({"iteration": iteration + 1, **self._describe(experience, row)} for row in chosen)

    def _describe(self, experience: Experience, row: int) -> dict:
        rollout, scores = experience.rollout, experience.scores
        sequences = rollout.sequences
        prompt = sequences.prompt_of_row[row]
        prompt_ids = sequences.unique_prompt_ids[prompt][sequences.unique_prompt_mask[prompt]]
        response = sequences.response_ids[row, : sequences.response_lengths[row]]
        return {
            "prompt": self.decode(prompt_ids.tolist()),
            "response": self.decode(response.tolist()),
            "finished": bool(rollout.finished[row]),
            "score": _number(scores.per_response[row]),
            "parts": {name: _number(part[row]) for name, part in scores.parts.items()},
            "advantage": float(masked_mean(experience.advantages[row], experience.counted[row])),
            "group": int(rollout.group_ids[row]),
            **({} if rollout.episodes is None else _turns(rollout, rollout.episodes, row)),
        }


def _turns(rollout: Rollout, episodes: Episodes, row: int) -> dict:
    """What an episode began with, its turns (how far each goes, its reward), and why the last one was the last."""
    num_turns, restarts = int(episodes.num_turns[row]), rollout.sequences.restarts
    return {
        "row": _as_json(rollout.rows[row]),
        "turn_ends": episodes.turn_ends[row, :num_turns].tolist(),
        "turn_rewards": [_digits(reward) for reward in episodes.turn_rewards[row, :num_turns]],
        "end_reward": _digits(episodes.end_reward[row]),
        "context_starts": [] if restarts is None else restarts[row].nonzero().flatten().tolist(),
        "messages": list(episodes.messages[row]),
        "stop": StopReason(int(rollout.stop_reason[row])).name.lower(),
        "failed": episodes.failure(row),
    }


def _as_json(row: Row) -> dict:
    """The columns of a row of data; a value that JSON cannot hold is a text."""
    return json.loads(json.dumps(row, default=str, skipkeys=True), parse_constant=str)


def _digits(x: torch.Tensor) -> float:
    """The number to the digits that float32 has: 0.55, not 0.550000011920929."""
    return float(f"{float(x):.7g}")


def _number(x: torch.Tensor) -> float | None:
    """None for a score that could not be given: JSON holds finite numbers only."""
    return float(x) if x.isfinite() else None
