"""An output head that is sliced along the vocabulary, and how its ranks agree on a token."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from shardes.distributed.world import all_gather


@dataclass
class VocabularySlice:
    """The slice of the vocabulary that this rank's logits cover, beginning at token `first`."""

    first: int
    group: dist.ProcessGroup  # the ranks that hold the slices

    def max(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest logit of all slices and its token, of equal ones the first; NaN counts as the
        largest.

        Ranks exchange a value and an index per row, not logits.

        Args:
            logits: shape (rows, slice).

        Returns:
            Values, float64, and tokens, each of shape (rows,).
        """
        value, index = logits.max(-1)
        maxima = self._gather(torch.stack([value.double(), (index + self.first).double()], -1))
        best = maxima[:, :, 0].argmax(0)[None]
        values, tokens = (maxima[:, :, i].gather(0, best)[0] for i in (0, 1))
        return values, tokens.long()

    def complete(self, logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """The logits of all slices, float32, shape (rows, vocab_size), on every rank."""
        full = logits.new_zeros(len(logits), vocab_size, dtype=torch.float32)
        full[:, self.first : self.first + logits.shape[1]] = logits
        dist.all_reduce(full, group=self.group)  # each element has one summand that is not zero
        return full

    def log_probs(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The log-probability of each token, in float32.

        Ranks exchange a sum and a logit per token.

        Args:
            logits: shape (rows, length, slice).
            tokens: shape (rows, length), as is the result.
        """
        logits, index = logits.float(), tokens - self.first
        inside = (index >= 0) & (index < logits.shape[-1])
        chosen = logits.gather(-1, index.where(inside, 0)[..., None])[..., 0]
        chosen = chosen.where(inside, -torch.inf)
        slices = self._gather(torch.stack([logits.logsumexp(-1), chosen], -1))
        return slices[..., 1].amax(0) - slices[..., 0].logsumexp(0)

    def _gather(self, values: torch.Tensor) -> torch.Tensor:
        """The values of all ranks, along a new first axis."""
        gathered = values.new_empty(self.group.size() * len(values), *values.shape[1:])
        all_gather(gathered, values, group=self.group)
        return gathered.view(-1, *values.shape)
