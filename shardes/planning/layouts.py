"""Layouts of ranks on a machine, and the order in which they are preferred."""

from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from shardes.config import loading as settings
from shardes.config.schema import Config, Gather, Offload
from shardes.engines import check_model
from shardes.errors import ConfigError


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
    def gathers_per_pass(self) -> bool:
        """Whether every forward pass gathers the weights anew."""
        return self.shard > 1 and self.gather is Gather.layer

    @property
    def preference(self) -> tuple[int, int, int]:
        """Sorts the preferred layouts first.

        No gathering is best, then gather=member, then gather=layer; among these, the smaller
        replica, then the smaller shard axis.
        """
        gathering = 0 if self.shard == 1 else 1 if self.gather is Gather.member else 2
        return gathering, self.shard * self.tensor, self.shard


@dataclass(frozen=True)
class Machine:
    """Nodes and their memory. `gpu_memory` is None on CPUs, where `per_node` counts ranks."""

    nodes: int
    per_node: int
    gpu_memory: int | None
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
    sharding = config.sharding
    return Layout(replicas, sharding.shard, sharding.tensor, sharding.gather, sharding.offload)


def possible_layouts(config: Config, module: PreTrainedModel, machine: Machine) -> list[Layout]:
    """The layouts that the model and its engine allow on a machine, the preferred ones first.

    Tensor parallelism stays within a node.
    """
    layouts = []
    for tensor in _divisors(machine.per_node):
        sharding = replace(config.sharding, shard=1, tensor=tensor, offload=Offload.none)
        try:
            check_model(replace(config, sharding=sharding), module)
        except ConfigError:
            continue
        for shard in _divisors(machine.ranks // tensor):
            for gather in Gather if shard > 1 else [Gather.member]:
                layouts.append(Layout(machine.ranks // (tensor * shard), shard, tensor, gather))
    return sorted(layouts, key=lambda layout: layout.preference)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
