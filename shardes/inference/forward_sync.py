"""Equal numbers of forward passes on all ranks of a group.

Where weights are gathered layer by layer, a forward pass is collective over the shard axis. Its
ranks work on different prompts, so some finish earlier than others; these go on making passes whose
results are not used, as `synced_gpus` of transformers' `generate` does. A group of None turns this
off.
"""

import torch
import torch.distributed as dist
from transformers import PreTrainedModel


def announce_forward(device: torch.device, group: dist.ProcessGroup | None) -> None:
    """Tell the group that this rank makes another forward pass."""
    if group is not None:
        _any_active(True, device, group)


def join_forwards(
    module: PreTrainedModel, device: torch.device, group: dist.ProcessGroup | None
) -> None:
    """Make forward passes until every rank of the group calls this."""
    while group is not None and _any_active(False, device, group):
        module(torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)


def _any_active(active: bool, device: torch.device, group: dist.ProcessGroup) -> bool:
    count = torch.tensor([int(active)], device=device)
    dist.all_reduce(count, group=group)
    return count.item() > 0
