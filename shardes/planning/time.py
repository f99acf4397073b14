"""The time of an iteration and its network traffic, computed from a device's rates.

This is a model, which was not compared with iterations on GPUs. It leaves out Python, kernel
launches, and memory reads below the full rate of a GPU, all of which make an iteration longer: its
times are lower bounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from shardes.config.schema import ESConfig, Gather, Noise, Offload, Restore
from shardes.planning.devices import Device
from shardes.planning.layouts import Layout, Machine
from shardes.planning.shapes import (
    ModelShapes,
    factor_elements,
    held_elements,
    slice_elements,
)
from shardes.planning.workload import Workload

# Bytes per member between replicas and store: 2,695 measured for eight (benchmarks/README.md)
EXCHANGED = 337
# The time of an element's low-rank noise relative to full noise, and what each rank adds, in the
# update: fitted to ranks 1, 2 and 4 on a CPU (docs/performance.md), and assumed of GPUs
LOW_RANK, LOW_RANK_EACH = 0.08, 0.06
# Elements per second of a digest on a GPU: some 20 kernels for 2**20 elements, of which each takes
# 5 µs to launch: an assumption
DIGESTS = 1e10
FACTORS = 1e9  # elements of low-rank factors that a rank's host makes per second: an assumption


@dataclass(frozen=True)
class Traffic:
    """Bytes over the network in an iteration; `reduced` and `gathered` are what one rank sends."""

    replicas: int  # all of them together
    reduced_per_token: int
    reduced: int
    gathered_per_member: int
    gathered: int


@dataclass(frozen=True)
class Seconds:
    """The parts of an iteration, on the replica that evaluates the most members."""

    perturb: float
    gather: float
    prefill: float
    decode: float
    update: float

    @property
    def total(self) -> float:
        return self.perturb + self.gather + self.prefill + self.decode + self.update


def noise_cost(es: ESConfig) -> float:
    """The time of an element's noise, relative to that of full noise."""
    if es.noise is Noise.full:
        return 1.0
    return LOW_RANK + LOW_RANK_EACH * es.rank


@dataclass(frozen=True)
class Estimate:
    """The traffic and the times of one layout, with responses of `response` tokens."""

    model: ModelShapes
    layout: Layout
    workload: Workload
    es: ESConfig
    response: int
    device: Device
    machine: Machine
    center_on_device: bool = False

    @property
    def members(self) -> int:
        """The number of members that the busiest replica evaluates."""
        return -(-self.es.population_size // self.layout.replicas)

    def traffic(self) -> Traffic:
        """The network traffic of an iteration."""
        layout, lengths = self.layout, replace(self.workload, members=1).of_rank(self.layout)[0]
        per_token = int(self._states * 2 * (layout.tensor - 1) / layout.tensor)
        slices = sum(slice_elements(self.model, layout.tensor))
        per_gather = int(slices * self.model.itemsize * (layout.shard - 1) / layout.shard)
        tokens = sum(lengths) + len(lengths) * self.response
        gathered = per_gather * self._gathers()  # in a ring
        return Traffic(
            replicas=self.es.population_size * EXCHANGED,
            reduced_per_token=per_token,
            reduced=per_token * tokens * self.members,
            gathered_per_member=gathered // self.members,
            gathered=gathered,
        )

    def seconds(self) -> Seconds:
        """The time of an iteration at the device's full speed; evaluations are not included."""
        layout, machine, device = self.layout, self.machine, self.device
        perturb, update = self._perturb_and_update()
        spans_nodes = layout.shard * layout.tensor > machine.per_node
        gather = self.traffic().gathered / (device.network if spans_nodes else device.link)
        if layout.offload is Offload.cpu:
            gather += self._gathers() * self._held * self.model.itemsize / device.host
        prefill = decode = 0.0
        for number, group in self.workload.groups(self.members):
            parts = self._generation(group, group.of_rank(layout)[0])
            prefill, decode = prefill + number * parts[0], decode + number * parts[1]
        return Seconds(self.members * perturb, gather, prefill, decode, update)

    def evaluation(self) -> float:
        """The seconds of one evaluation of the center on both splits, without gathers."""
        alone = replace(self.workload, members=1)
        lists = alone.of_rank(self.layout)[1:]
        return sum(sum(self._generation(alone, lengths)) for lengths in lists)

    def _perturb_and_update(self) -> tuple[float, float]:
        """The seconds of one member's perturbation, and of the update with the new digest."""
        es, device, elements = self.es, self.device, self._held
        pair = 2 if es.antithetic else 1  # members of one seed
        offloads = self.layout.offload is Offload.cpu
        normals = device.host_normals if offloads else device.normals
        noise = elements * noise_cost(es) / normals  # of one seed
        update = es.population_size / pair * noise
        on_cpu = self.machine.gpu_memory is None
        subtracts = es.restore is Restore.subtract
        if on_cpu or not (subtracts or self.center_on_device):
            update += elements / device.digests
        else:
            update += elements / DIGESTS
        if subtracts:
            memory = device.host if offloads else device.bandwidth
            moved = elements * 2 * self.model.itemsize / memory
            return 2 * (moved + noise), update + moved
        if self.center_on_device:
            perturb = elements * (4 + self.model.itemsize) / device.bandwidth + noise
            update += elements * (8 + self.model.itemsize) / device.bandwidth
        elif on_cpu:
            perturb = elements * 4 / device.host + noise
            update += elements * 8 / device.host
        elif offloads:  # beside the noise, reads and writes of the host's memory are short
            perturb = noise
        else:  # a block comes from the host while another's noise is made
            copied = elements * 4 / device.host
            perturb = max(copied, noise)
            update += copied
        if self.workload.members > 1:
            perturb = self._factors / pair * (1 / FACTORS + 4 / device.host)
        return perturb, update

    def _generation(self, workload: Workload, lengths: Sequence[int]) -> tuple[float, float]:
        """The seconds of prefill and of decoding.

        A decode step reads the weights once, and each row's cache and low-rank factors. On a GPU
        its operations take time only if they take longer than its reads, as with many rows.
        """
        model, device, tensor = self.model, self.device, self.layout.tensor
        link = device.network if tensor > self.machine.per_node else device.link
        reduce = self._states * 2 * (tensor - 1) / tensor / link  # a token's sums
        latency = 2 * device.latency if tensor > 1 else 0.0
        latency = model.num_hidden_layers * (latency + device.overhead)
        heads = model.num_key_value_heads / tensor
        cached = 2 * model.num_hidden_layers * heads * model.head_dim * model.itemsize
        operations = 2 / tensor  # of a token and an element
        term = self._factors * device.term if workload.members > 1 else 0.0  # bytes of a row
        layers_each, head = _used(model, 1)
        prefill = decode = 0.0
        for rows, width in workload.batches(lengths):
            read = (_used(model, rows * width)[0] + head) * model.itemsize / tensor + rows * term
            computed = rows * (width * layers_each + head) * operations
            prefill += self._busy(read, computed) + rows * width * reduce + latency
            attended = workload.attended(width, self.response)
            rows = workload.rows(rows)
            read = (_used(model, rows)[0] + head) * model.itemsize / tensor + rows * term
            read += rows * attended * cached
            computed = rows * (layers_each + head) * operations
            step = self._busy(read, computed) + rows * reduce + latency
            decode += (self.response - 1) * step
        return prefill, decode

    def _busy(self, read: float, operations: float) -> float:
        """The seconds of reading so many bytes and of so many operations."""
        device = self.device
        times = read / device.bandwidth, operations / device.flops
        return max(times) if device.overlaps else sum(times)

    @property
    def _held(self) -> int:
        """The elements of the largest rank."""
        return held_elements(self.model, self.layout.tensor, self.layout.shard)

    @property
    def _factors(self) -> int:
        """The elements of a member's low-rank factors on a rank."""
        return sum(factor_elements(self.model, self.layout.tensor, self.es.rank, self.es.evolve))

    @property
    def _states(self) -> int:
        """The bytes of a token that the ranks of the tensor axis sum up."""
        return 2 * self.model.num_hidden_layers * self.model.hidden_size * self.model.itemsize

    def _gathers(self) -> int:
        """How often a replica gathers its weights in an iteration."""
        return sum(
            number * self._passes(group) for number, group in self.workload.groups(self.members)
        )

    def _passes(self, group: Workload) -> int:
        """How often it does so for a group of members: once, or in every forward pass."""
        if self.layout.gather is Gather.member:
            return 1
        return self.response * len(list(group.batches(group.of_rank(self.layout)[0])))


def _used(model: ModelShapes, tokens: int) -> tuple[float, int]:
    """The elements of layers and head that a forward pass of `tokens` tokens computes with.

    Of the experts, these are the chosen ones.
    """
    layers, head = _layers_and_head(model)
    if not model.num_experts:
        return layers, head
    unused = (1 - model.num_experts_per_tok / model.num_experts) ** tokens
    return layers + model.experts_numel * (1 - unused), head


@lru_cache(maxsize=16)
def _layers_and_head(model: ModelShapes) -> tuple[int, int]:
    """The elements outside of embeddings, head and experts, and those of the head."""
    embeddings = sum(p.numel for p in model.parameters if p.looked_up)
    own = sum(p.numel for p in model.parameters if p.name == "lm_head.weight")
    return model.numel - model.experts_numel - embeddings - own, own or embeddings
