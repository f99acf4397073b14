"""A head that is cut into parts of the vocabulary: how the ranks that hold them agree on a token."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from shardes.world import all_gather


@dataclass
class VocabularyPart:
    """What of the vocabulary a rank's logits cover, where a head is cut into parts: from token `first` on."""

    first: int
    group: dist.ProcessGroup  # the ranks with the other parts

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """The best token of each row over all parts, the first of equals. Shape (rows, part) to (rows,).

        Ranks exchange a value and an index per row, not logits.
        """
        value, index = logits.max(-1)
        parts = self._gather(torch.stack([value.double(), (index + self.first).double()], -1))
        best = parts[:, :, 0].argmax(0)
        return parts[:, :, 1].gather(0, best[None])[0].long()

    def log_probs(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The log-probability of each token, float32. Shapes (rows, length, part) and (rows, length) to the latter.

        Ranks exchange a sum and a logit per token.
        """
        logits, at = logits.float(), tokens - self.first
        mine = (at >= 0) & (at < logits.shape[-1])
        picked = logits.gather(-1, at.where(mine, 0)[..., None])[..., 0].where(mine, -torch.inf)
        parts = self._gather(torch.stack([logits.logsumexp(-1), picked], -1))
        return parts[..., 1].amax(0) - parts[..., 0].logsumexp(0)

    def _gather(self, mine: torch.Tensor) -> torch.Tensor:
        """What each rank has, along a new first axis."""
        parts = mine.new_empty(self.group.size() * len(mine), *mine.shape[1:])
        all_gather(parts, mine, group=self.group)
        return parts.view(-1, *mine.shape)
