"""The time of an iteration and its network traffic, computed from a device's data sheet.

This is a model. No GPU was measured. It leaves out Python, kernel launches, and memory reads below
the full rate, all of which make an iteration longer: its times are lower bounds.
"""

from dataclasses import dataclass
from math import prod

from shardes.config.schema import Gather, Offload, Restore
from shardes.planning.layouts import Layout, Machine
from shardes.planning.shapes import ModelShapes
from shardes.planning.workload import Workload

# Bytes per member between replicas and store: 2,695 measured for eight (benchmarks/README.md)
EXCHANGED = 337


@dataclass(frozen=True)
class Device:
    """A GPU's rates per second: bytes (links: in one direction, per GPU), operations, normals."""

    memory: float
    flops: float  # dense bfloat16
    link: float  # NVLink within a node
    network: float  # between nodes
    host: float  # PCIe
    normals: float  # ε from the noise kernel
    latency: float = 1e-5  # seconds that a sum over ranks takes at least


# From vendors' data sheets (SXM, 80 and 141 GB; DGX systems for the network). The rates of normals
# and the latency are assumptions.
DEVICES = {
    "a100": Device(2.039e12, 312e12, 300e9, 25e9, 32e9, 5e10),
    "h100": Device(3.35e12, 989e12, 450e9, 50e9, 64e9, 1e11),
    "h200": Device(4.8e12, 989e12, 450e9, 50e9, 64e9, 1e11),
}


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


def members_per_replica(layout: Layout, population_size: int) -> int:
    """The number of members that the busiest replica evaluates."""
    return -(-population_size // layout.replicas)


def traffic(
    model: ModelShapes, layout: Layout, workload: Workload, population_size: int, response: int
) -> Traffic:
    """The network traffic of an iteration with responses of `response` tokens."""
    members, lengths = members_per_replica(layout, population_size), workload.of_rank(layout)[0]
    slices = sum(prod(p.shape_on(layout.tensor, 0)) for p in model.parameters) * model.itemsize
    states = 2 * model.num_hidden_layers * model.hidden_size * model.itemsize
    per_token = int(states * 2 * (layout.tensor - 1) / layout.tensor)
    gathers = _forward_passes(workload, layout, response) if layout.gathers_per_pass else 1
    per_member = int(slices * (layout.shard - 1) / layout.shard) * gathers  # in a ring
    tokens = sum(lengths) + len(lengths) * response
    return Traffic(
        replicas=population_size * EXCHANGED,
        reduced_per_token=per_token,
        reduced=per_token * tokens * members,
        gathered_per_member=per_member,
        gathered=per_member * members,
    )


def seconds(
    model: ModelShapes,
    layout: Layout,
    workload: Workload,
    restore: Restore,
    population_size: int,
    response: int,
    device: Device,
    machine: Machine,
) -> Seconds:
    """The time of an iteration with responses of `response` tokens, at a device's full speed.

    Evaluations of the center are not included.
    """
    members = members_per_replica(layout, population_size)
    elements = sum(model.held(layout.tensor, layout.shard, 0, 0))
    if restore is Restore.copy:
        perturb = elements * (4 / device.host + 1 / device.normals)
        update = elements * (8 / device.host + population_size / device.normals)
    else:
        perturb = 2 * elements * (2 * model.itemsize / device.memory + 1 / device.normals)
        update = elements * (2 * model.itemsize / device.memory + population_size / device.normals)
    sent = traffic(model, layout, workload, population_size, response)
    spans_nodes = layout.shard * layout.tensor > machine.per_node
    gather = sent.gathered / (device.network if spans_nodes else device.link)
    if layout.offload is Offload.cpu:
        per_layer = layout.gather is Gather.layer
        loads = _forward_passes(workload, layout, response) if per_layer else 1
        gather += members * loads * elements * model.itemsize / device.host
    link = device.network if layout.tensor > machine.per_node else device.link
    reduce = sent.reduced_per_token / link
    prefill, decode = _generation(model, layout, workload, response, device, reduce)
    return Seconds(members * perturb, gather, members * prefill, members * decode, update)


def _generation(
    model: ModelShapes,
    layout: Layout,
    workload: Workload,
    response: int,
    device: Device,
    reduce: float,
) -> tuple[float, float]:
    """The seconds of a member's prefill and decoding; `reduce` are those of a token's sums.

    A decode step reads the weights once and the cache of each row. With many rows its operations
    take longer than its reads.
    """
    cached = (
        2
        * model.num_hidden_layers
        * model.num_key_value_heads
        * model.head_dim
        * model.itemsize
        / layout.tensor
    )
    latency = 2 * model.num_hidden_layers * device.latency if layout.tensor > 1 else 0.0
    operations = 2 * _used(model, 1) / layout.tensor / device.flops  # of a token
    prefill = decode = 0.0
    for rows, width in workload.batches(workload.of_rank(layout)[0]):
        prefill += rows * width * (operations + reduce) + latency
        weights = _used(model, rows) * model.itemsize / layout.tensor
        read = (weights + rows * (width + response / 2) * cached) / device.memory
        decode += response * (max(read, rows * operations) + rows * reduce + latency)
    return prefill, decode


def _forward_passes(workload: Workload, layout: Layout, response: int) -> int:
    """The number of forward passes of one member."""
    return sum(response for _ in workload.batches(workload.of_rank(layout)[0]))


def _used(model: ModelShapes, tokens: int) -> float:
    """The elements that a forward pass of `tokens` tokens uses: of the experts, the chosen ones."""
    embedding = next((p.numel for p in model.parameters if "embed" in p.name), 0)
    # An embedding that is not also the head is only looked up.
    looked_up = embedding if any(p.name == "lm_head.weight" for p in model.parameters) else 0
    dense = model.numel - model.experts_numel - looked_up
    if not model.num_experts:
        return dense
    unused = (1 - model.num_experts_per_tok / model.num_experts) ** tokens
    return dense + model.experts_numel * (1 - unused)
