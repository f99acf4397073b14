"""Layouts of ranks on a machine, and the order in which they are preferred."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from shardes.config import loading as settings
from shardes.config.schema import Config, Gather, Offload
from shardes.engines import check_model
from shardes.errors import ConfigError
from shardes.inference.decode_graph import check_static_decoding


@dataclass(frozen=True)
class Layout:
    """The degrees of replicas, the shard axis and the tensor axis."""

    replicas: int
    shard: int
    tensor: int
    gather: Gather
    offload: Offload = Offload.none

    def __str__(self) -> str:
        text = f"{self.replicas} × {self.shard} × {self.tensor}"
        if self.shard > 1 or self.offload is Offload.cpu:
            text += f", gather={self.gather.value}"
        return text + ", offload" * (self.offload is Offload.cpu)

    @property
    def preference(self) -> tuple[bool, int, int, int]:
        """Sorts the preferred layouts first.

        Weights on the GPU are best; then no gathering, then gather=member, then gather=layer; among
        these, the smaller replica, then the smaller shard axis.
        """
        gathering = 0 if self.shard == 1 else 1 if self.gather is Gather.member else 2
        offloads = self.offload is Offload.cpu
        return offloads, gathering, self.shard * self.tensor, self.shard


@dataclass(frozen=True)
class Machine:
    """Nodes and their memory. `gpu_memory` is None on CPUs, where `per_node` counts ranks."""

    nodes: int
    per_node: int
    gpu_memory: float | None
    host_memory: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node


def configured_layout(config: Config, module: PreTrainedModel, machine: Machine) -> Layout:
    """The layout in the settings.

    Raises:
        ConfigError: it does not divide the machine, or the engine does not support it.
    """
    try:
        replicas = settings.check_layout(config, machine.ranks)
    except ConfigError as error:
        raise ConfigError(str(error).replace("ranks that were started", "GPUs")) from None
    check_model(config, module)
    check_static_decoding(config, module)
    sharding = config.sharding
    return Layout(replicas, sharding.shard, sharding.tensor, sharding.gather, sharding.offload)


def possible_layouts(
    config: Config, module: PreTrainedModel, machine: Machine
) -> Iterator[list[Layout]]:
    """The layouts that the model and its engine allow on a machine, the preferred ones first.

    Tensor parallelism stays within a node. Each list has a layout, and then the same with the live
    weights offloaded, if the engine does that.
    """
    layouts = []
    for tensor in _divisors(machine.per_node):
        if not _is_possible(config, module, Layout(1, 1, tensor, Gather.member)):
            continue
        for shard in _divisors(machine.ranks // tensor):
            for gather in Gather if shard > 1 else [Gather.member]:
                layout = Layout(machine.ranks // (tensor * shard), shard, tensor, gather)
                if _is_possible(config, module, layout):
                    layouts.append(layout)
    for layout in sorted(layouts, key=lambda layout: layout.preference):
        # Without a shard axis, only gather=layer leaves the GPU less than the whole slice.
        gather = layout.gather if layout.shard > 1 else Gather.layer
        offloaded = replace(layout, gather=gather, offload=Offload.cpu)
        possible = machine.gpu_memory is not None and _is_possible(config, module, offloaded)
        yield [layout, offloaded] if possible else [layout]


def _is_possible(config: Config, module: PreTrainedModel, layout: Layout) -> bool:
    degrees = {key: getattr(layout, key) for key in ("shard", "tensor", "gather", "offload")}
    config = replace(config, sharding=replace(config.sharding, **degrees))
    try:
        check_model(config, module)
        check_static_decoding(config, module)
    except ConfigError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
