"""The responses of a rollout while they grow.

A token of a response was chosen by the actor or fed to it, such as the answer of a tool: attended, never learned from.
Here the actor chose "a b", the tool's answer "1 2" was fed, and the actor chose "c" and its EOS "$":

    ids      a b 1 2 c $ . .        length                6
    fed      . . 1 1 . . . .        stream position       4     the tokens chosen so far: feeding draws no number
    chosen   1 1 . . 1 1 . .        stop reason         EOS
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llmrl.batches import Prompts, Rollout, Sequences, StopReason
from llmrl.roles import Sampling


class Responses:
    """Fixed tensors on the device of the prompts, a row per response: (B, T), T the length limit, and (B,).

    A row is known by its index: those of one prompt are adjacent, prompts in order. Nothing that is done once per token
    waits for the device.

    Args:
        prompts: What is responded to.
        sampling: Number of responses per prompt, length limit, and the global number of the first response.
        eos_ids: Any of them, if the actor chooses it, ends a response.
    """

    def __init__(self, prompts: Prompts, sampling: Sampling, *, eos_ids: Sequence[int]) -> None:
        assert sampling.first_response % sampling.num_responses == 0, "numbers of a rollout begin with a whole group"
        device = prompts.ids.device
        rows = len(prompts.rows) * sampling.num_responses
        self.prompts = prompts
        self.group_size = sampling.num_responses
        self.max_tokens = sampling.max_response_tokens
        self.eos_ids = torch.tensor(eos_ids, dtype=torch.long, device=device)
        self.numbers: Int[Tensor, " B"] = torch.arange(rows, device=device) + sampling.first_response
        """Global number of each response: the key of its random stream."""
        self.ids: Int[Tensor, "B T"] = torch.zeros(rows, self.max_tokens, dtype=torch.long, device=device)
        self.logprobs: Float[Tensor, "B T"] = torch.zeros(rows, self.max_tokens, device=device)
        self.fed: Bool[Tensor, "B T"] = torch.zeros(rows, self.max_tokens, dtype=torch.bool, device=device)
        self.num_fed: Int[Tensor, " B"] = torch.zeros(rows, dtype=torch.long, device=device)
        self.lengths: Int[Tensor, " B"] = torch.zeros(rows, dtype=torch.long, device=device)
        """Chosen and fed tokens."""
        self.stop_reason: Int[Tensor, " B"] = torch.full((rows,), StopReason.NONE, device=device)

    @property
    def chosen(self) -> Bool[Tensor, "B T"]:
        """True on the tokens that the actor chose."""
        columns = torch.arange(self.max_tokens, device=self.ids.device)
        return (columns < self.lengths[:, None]) & ~self.fed

    def stream_positions(self, rows: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
        """How many tokens of each row the actor has chosen: the position of the next draw in the row's stream."""
        return (self.lengths - self.num_fed)[rows]

    def last_ids(self, rows: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
        """The last token of each row, chosen or fed."""
        return self.ids[rows, self.lengths[rows] - 1]

    def append(
        self, rows: Int[Tensor, " R"], ids: Int[Tensor, " R"], logprobs: Float[Tensor, " R"]
    ) -> Int[Tensor, " R"]:
        """Appends to each of these rows, all under way, a token that the actor chose. Returns their stop reasons."""
        columns = self.lengths[rows]
        lengths = columns + 1
        stop_reason = self._stop_reason_at(lengths).masked_fill(torch.isin(ids, self.eos_ids), StopReason.EOS)
        self.ids[rows, columns] = ids
        self.logprobs[rows, columns] = logprobs
        self.lengths[rows] = lengths
        self.stop_reason[rows] = stop_reason
        return stop_reason

    def put(
        self,
        rows: Int[Tensor, " R"],
        ids: Int[Tensor, "R S"],
        logprobs: Float[Tensor, "R S"],
        lengths: Int[Tensor, " R"],
        stop_reason: Int[Tensor, " R"],
    ) -> None:
        """Puts responses that were decoded elsewhere in these rows, of which they are all. Columns from T on are left
        out."""
        self.ids[rows] = ids[:, : self.max_tokens]
        self.logprobs[rows] = logprobs[:, : self.max_tokens]
        self.lengths[rows] = lengths
        self.stop_reason[rows] = stop_reason

    def feed(self, fed: Mapping[int, Sequence[int]]) -> None:
        """Appends tokens that the actor did not choose, by row: the answers of tools, for which no engine calls it yet.
        A row that its EOS had ended is under way again; no id that is fed ends one.

        Raises:
            ValueError: A row has no room for them.
        """
        rows = self.ids.new_tensor(list(fed))
        starts = self.lengths[rows].tolist()
        for (row, ids), start in zip(fed.items(), starts, strict=True):
            if len(ids) > self.max_tokens - start:
                raise ValueError(
                    f"{len(ids)} tokens to feed to response {row} of this rollout, which has {start}, must be at most "
                    f"{self.max_tokens - start}: rollout.max_response_tokens ({self.max_tokens}) counts them too"
                )
        for (row, ids), start in zip(fed.items(), starts, strict=True):
            self.ids[row, start : start + len(ids)] = self.ids.new_tensor(ids)
            self.fed[row, start : start + len(ids)] = True
        counts = self.ids.new_tensor([len(ids) for ids in fed.values()])
        self.num_fed[rows] += counts
        self.lengths[rows] += counts
        self.stop_reason[rows] = self._stop_reason_at(self.lengths[rows])

    def rollout(self) -> Rollout:
        """The rollout that the responses make, as wide as the longest."""
        width = int(self.lengths.max())
        prompts = self.prompts
        return Rollout(
            sequences=Sequences(
                unique_prompt_ids=prompts.ids,
                unique_prompt_mask=prompts.mask,
                prompt_of_row=torch.arange(len(prompts.rows), device=prompts.ids.device).repeat_interleave(
                    self.group_size
                ),
                response_ids=self.ids[:, :width].contiguous(),
                response_mask=self.chosen[:, :width].contiguous(),
                response_lengths=self.lengths,
            ),
            rollout_logprobs=self.logprobs[:, :width].contiguous(),
            stop_reason=self.stop_reason,
            group_ids=self.numbers // self.group_size,
            rows=tuple(row for row in prompts.rows for _ in range(self.group_size)),
        )

    def _stop_reason_at(self, lengths: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
        """`LENGTH` for responses of these lengths that have no room, else `NONE`."""
        return torch.where(lengths == self.max_tokens, StopReason.LENGTH, StopReason.NONE)
