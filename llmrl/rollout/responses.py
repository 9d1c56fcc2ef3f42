"""The responses of a rollout while they grow.

A token of a response was chosen by the actor or fed to it, such as the answer of a tool: attended, never learned from.
Here the actor chose "a b", the tool's answer "1 2" was fed, and the actor chose "c" and its EOS "$":

    ids      a b 1 2 c $ . .        length                6
    fed      . . 1 1 . . . .        stream position       4     the tokens chosen so far: feeding draws no number
    chosen   1 1 . . 1 1 . .        stop reason         EOS
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int, Int16
from torch import Tensor

from llmrl.batches import NewContext, Prompts, Rollout, Sequences, StopReason
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
        self.restarts: Bool[Tensor, "B T"] = torch.zeros_like(self.fed)
        """True on the first token of each `NewContext`."""
        self.num_fed: Int[Tensor, " B"] = torch.zeros(rows, dtype=torch.long, device=device)
        self.lengths: Int[Tensor, " B"] = torch.zeros(rows, dtype=torch.long, device=device)
        """Chosen and fed tokens."""
        self.max_turn_tokens = sampling.max_turn_tokens or self.max_tokens
        self.limits: Int[Tensor, " B"] = self._limits_after(self.lengths)
        """Length at which the current turn of each row is truncated."""
        self.stop_reason: Int[Tensor, " B"] = torch.full((rows,), StopReason.NONE, device=device)
        self.routes: Int16[Tensor, "B T L"] | None = None
        """Routes of the chosen tokens, once some are set."""

    @property
    def chosen(self) -> Bool[Tensor, "B T"]:
        """True on the tokens that the actor chose."""
        columns = torch.arange(self.max_tokens, device=self.ids.device)
        return (columns < self.lengths[:, None]) & ~self.fed

    def stream_positions(self, rows: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
        """How many tokens of each row the actor has chosen: the position of the next draw in the row's stream."""
        return (self.lengths - self.num_fed)[rows]

    def end_at_once(self, rows: Sequence[int]) -> None:
        """Has these rows, of which nothing is drawn yet, end with their first token: no response is empty."""
        self.limits[list(rows)] = 1

    def last_ids(self, rows: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
        """The last token of each row, chosen or fed."""
        return self.ids[rows, self.lengths[rows] - 1]

    def last_turns(self, rows: Int[Tensor, " R"]) -> dict[int, list[int]]:
        """The ids of the current turn of each row: those that the actor has chosen since it was last fed."""
        turns = {}
        for row, ids, fed, length in zip(
            rows.tolist(), self.ids[rows].tolist(), self.fed[rows].tolist(), self.lengths[rows].tolist(), strict=True
        ):
            begin = max((column + 1 for column in range(length) if fed[column]), default=0)
            turns[row] = ids[begin:length]
        return turns

    def set_routes(
        self, rows: Int[Tensor, " R"], columns: Int[Tensor, " R"] | slice, routes: Int16[Tensor, "R *columns L"]
    ) -> None:
        """Sets the routes of tokens of these rows."""
        if self.routes is None:
            self.routes = routes.new_zeros(*self.ids.shape, routes.shape[-1])
        self.routes[rows, columns] = routes

    def append(
        self, rows: Int[Tensor, " R"], ids: Int[Tensor, " R"], logprobs: Float[Tensor, " R"]
    ) -> Int[Tensor, " R"]:
        """Appends to each of these rows, all under way, a token that the actor chose. Returns their stop reasons."""
        columns = self.lengths[rows]
        lengths = columns + 1
        at_limit = lengths == self.limits[rows]
        stop_reason = torch.where(at_limit, StopReason.LENGTH, StopReason.NONE)
        stop_reason = stop_reason.masked_fill(torch.isin(ids, self.eos_ids), StopReason.EOS)
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
        """Appends tokens that the actor did not choose, by row: what an environment answers. A row that its EOS had
        ended is under way again, in a new turn; no id that is fed ends one.

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
            self.restarts[row, start] |= isinstance(ids, NewContext)
        counts = self.ids.new_tensor([len(ids) for ids in fed.values()])
        self.num_fed[rows] += counts
        self.lengths[rows] += counts
        lengths = self.lengths[rows]
        self.limits[rows] = self._limits_after(lengths)
        self.stop_reason[rows] = torch.where(lengths == self.max_tokens, StopReason.LENGTH, StopReason.NONE)

    def _limits_after(self, lengths: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
        """Length at which a turn is truncated that begins at this length."""
        return (lengths + self.max_turn_tokens).clamp(max=self.max_tokens)

    def rollout(self) -> Rollout:
        """The rollout that the responses make, as wide as the longest."""
        width = int(self.lengths.max())
        prompts = self.prompts
        restarts = self.restarts[:, :width].contiguous()
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
                restarts=restarts if restarts.any() else None,
            ),
            rollout_logprobs=self.logprobs[:, :width].contiguous(),
            stop_reason=self.stop_reason,
            group_ids=self.numbers // self.group_size,
            rows=tuple(row for row in prompts.rows for _ in range(self.group_size)),
            routes=None if self.routes is None else self.routes[:, :width].contiguous(),
        )
