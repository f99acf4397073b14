"""The rows that are decoded together; finished ones leave."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass
class Batch:
    """The rows of a batch: prompts, padded on the left, and responses so far.

    Attributes:
        ids, mask, positions: token ids, attention mask and positions, shape (rows, width of the
            prompts + max_new_tokens); the mask also covers new tokens.
        width: tokens of a row so far, with padding.
        rows: the prompt's number, for each row.
        active: whether a row's response goes on.
    """

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int] | None
    members: Sequence[int]
    max_new_tokens: int
    device: torch.device

    def __post_init__(self) -> None:
        self.responses: list[list[int]] = [[] for _ in self.prompts]
        self.rows = list(range(len(self.prompts)))
        self.active = [True] * len(self.prompts)
        self.width = max(map(len, self.prompts))
        new = self.max_new_tokens
        padding = [self.width - len(prompt) for prompt in self.prompts]
        ids = [
            [0] * n + list(prompt) + [0] * new
            for n, prompt in zip(padding, self.prompts, strict=True)
        ]
        mask = [[0] * n + [1] * (self.width + new - n) for n in padding]
        self.ids = torch.tensor(ids, device=self.device)
        self.mask = torch.tensor(mask, device=self.device)
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)

    @property
    def row_members(self) -> list[int]:
        """The member of each row; empty if all rows are the same model's."""
        return [self.members[row] for row in self.rows] if self.members else []

    def append(self, tokens: torch.Tensor) -> None:
        """Add one token to each row."""
        self.ids[:, self.width] = tokens
        self.width += 1

    def keep(self, active: list[bool]) -> torch.Tensor:
        """Drop the rows that are not active; row i becomes the former row `indices[i]`, of the
        indices returned.
        """
        kept = _compact(active)
        indices = torch.tensor(kept, device=self.device)
        self.ids, self.mask, self.positions = (
            tensor[indices] for tensor in (self.ids, self.mask, self.positions)
        )
        self.rows, self.active = [self.rows[i] for i in kept], [True] * len(kept)
        return indices


def _compact(active: list[bool]) -> list[int]:
    """The former row of each row of a smaller batch: the last active rows replace finished ones."""
    count = sum(active)
    moved = (row for row in range(count, len(active)) if active[row])
    return [row if active[row] else next(moved) for row in range(count)]
