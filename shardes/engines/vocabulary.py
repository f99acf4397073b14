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
        mine = torch.stack([value.double(), (index + self.first).double()], -1)
        parts = mine.new_empty(self.group.size() * len(mine), 2)
        all_gather(parts, mine, group=self.group)
        parts = parts.view(-1, *mine.shape)
        best = parts[:, :, 0].argmax(0)
        return parts[:, :, 1].gather(0, best[None])[0].long()
