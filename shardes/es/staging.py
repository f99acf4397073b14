"""Where the float32 center lies, and how blocks of one in host memory reach the device."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from transformers import PreTrainedConfig

from shardes.config.schema import CenterDevice, Config, Offload
from shardes.distributed.world import World
from shardes.inference.memory import generation_bytes
from shardes.sharding.regions import BLOCK, ParameterShard

DEVICE_BLOCK = 1 << 24  # elements processed at a time on an accelerator
MARGIN = 0.1  # of the device's memory: libraries, buffers of collectives, fragmentation

Part = TypeVar("Part")


def block_size(device: torch.device) -> int:
    """Elements processed at a time, which bounds temporary memory."""
    return BLOCK if device.type == "cpu" else DEVICE_BLOCK


def center_device(
    config: Config,
    world: World,
    shards: Sequence[ParameterShard],
    model: PreTrainedConfig,
    buffers: int = 0,
) -> torch.device:
    """Where the center lies, from `center.device`; collective, and the same on all ranks.

    `auto` is the device if, with all that is allocated now, generation and `MARGIN` leave room for
    the float32 center, and as many further values per element as `buffers`, on every rank of the
    replica. The choice changes no bit.
    """

    def fits() -> bool:
        itemsizes = [shard.tensor.element_size() for shard in shards]
        slices = [
            sum(region.numel for region in shard.tensor_regions) * itemsize
            for shard, itemsize in zip(shards, itemsizes, strict=True)
        ]
        held = (1 + buffers) * sum(shard.numel for shard in shards)
        needed = needed_bytes(config, model, held, itemsizes[0], slices)
        fit, ranks = world.sum(float(needed <= free_bytes(world)), 1.0)
        return fit == ranks

    is_on_device = world.device.type != "cpu" and lies_on_device(config, fits)
    return world.device if is_on_device else torch.device("cpu")


def lies_on_device(config: Config, fits: Callable[[], bool]) -> bool:
    """Whether the center lies on an accelerator that a run computes on.

    Args:
        fits: whether it has `needed_bytes`; asked only if that decides.
    """
    wanted = config.center.device
    offloads = config.sharding.offload is Offload.cpu  # then noise is made on the host
    if offloads or wanted is CenterDevice.host:
        return False
    return wanted is CenterDevice.device or fits()


def needed_bytes(
    config: Config, model: PreTrainedConfig, held: int, itemsize: int, slices: Sequence[int]
) -> int:
    """What a rank's part of the center, of `held` elements, and generation take on the device.

    The other arguments are those of `generation_bytes`.
    """
    return 4 * held + generation_bytes(config, model, itemsize, slices)


def free_bytes(world: World) -> float:
    """What a rank can still allocate on its device without `MARGIN`, if ranks that share it take
    equal parts.
    """
    module = torch.get_device_module(world.device)
    module.empty_cache()  # else what loading has left counts as taken
    free, total = module.mem_get_info(world.device)
    return (free - MARGIN * total) / world.ranks_on_device


class Stager:
    """Brings blocks from pinned host memory to a device: the next one is copied on a stream of its
    own, while the present one is used.

    Args:
        device: the current device.
        size: elements of the largest block.
    """

    def __init__(self, device: torch.device, size: int):
        self._module = torch.get_device_module(device)
        self._stream = self._module.Stream()
        self._buffers = [torch.empty(size, dtype=torch.float32, device=device) for _ in range(2)]

    def stage(
        self, parts: Iterable[tuple[Part, torch.Tensor]]
    ) -> Iterator[tuple[Part, torch.Tensor]]:
        """Each part with its block on the device, which is valid until the next is asked for."""
        ahead = None
        for number, (part, stored) in enumerate(parts):
            block = self._buffers[number % 2][: stored.numel()]
            copied = self._copy(block, stored)
            if ahead is not None:
                yield self._arrived(*ahead)
            ahead = part, block, copied
        if ahead is not None:
            yield self._arrived(*ahead)

    def finish(self) -> None:
        """Wait for copies in both directions, before the host reads or writes its memory."""
        self._module.synchronize()

    def _copy(self, block: torch.Tensor, stored: torch.Tensor):
        # The block's last user was queued before, on the current stream.
        self._stream.wait_stream(self._module.current_stream())
        with self._module.stream(self._stream):
            block.copy_(stored, non_blocking=True)
            return self._stream.record_event()

    def _arrived(self, part: Part, block: torch.Tensor, copied) -> tuple[Part, torch.Tensor]:
        self._module.current_stream().wait_event(copied)
        return part, block
