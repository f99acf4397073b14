"""How long an iteration takes, and what crosses the network: arithmetic on a machine's stated figures.

A model, not a measurement: no GPU was measured. What is not counted (Python, kernels' starts, memory read at less than
the full rate) makes an iteration longer, never shorter: read the times as "at least".
"""

from dataclasses import dataclass
from math import prod

from shardes.config import Gather, Offload, Restore
from shardes.plan import Layout, Machine, Model, Work, layer_passes_gather

EXCHANGED = 483  # bytes per member between replicas and store: 3,867 measured for eight (benchmarks/README.md)


@dataclass(frozen=True)
class Device:
    """A GPU's figures: per second, bytes (links: in one direction, per GPU), operations, normals."""

    memory: float
    flops: float  # dense bfloat16
    link: float  # NVLink within a node
    network: float  # between nodes
    host: float  # PCIe
    normals: float  # ε made by the noise kernel
    latency: float = 1e-5  # seconds that a sum over ranks takes at least


# Vendors' data sheets (SXM, 80 and 141 GB; DGX systems for the network), but for the normals and the latency: assumed.
DEVICES = {
    "a100": Device(2.039e12, 312e12, 300e9, 25e9, 32e9, 5e10),
    "h100": Device(3.35e12, 989e12, 450e9, 50e9, 64e9, 1e11),
    "h200": Device(4.8e12, 989e12, 450e9, 50e9, 64e9, 1e11),
}


@dataclass(frozen=True)
class Traffic:
    """Bytes over the network. `reduced` and `gathered` are what one rank sends, in an iteration."""

    replicas: int  # all of them together, in an iteration
    reduced_per_token: int
    reduced: int
    gathered_per_member: int
    gathered: int


@dataclass(frozen=True)
class Seconds:
    """An iteration's parts, on the replica that evaluates most members."""

    perturb: float
    gather: float
    prefill: float
    decode: float
    update: float

    @property
    def total(self) -> float:
        return self.perturb + self.gather + self.prefill + self.decode + self.update


def members(layout: Layout, population: int) -> int:
    """How many the busiest replica evaluates."""
    return -(-population // layout.replicas)


def passes(work: Work, layout: Layout, response: int) -> int:
    """The forward passes that one member takes."""
    return sum(response for _ in work.batches(work.of_rank(layout)[0]))


def traffic(model: Model, layout: Layout, work: Work, population: int, response: int) -> Traffic:
    """What crosses the network in an iteration whose responses have `response` tokens."""
    each, lengths = members(layout, population), work.of_rank(layout)[0]
    slices = sum(prod(p.shape_on(layout.tensor, 0)) for p in model.parameters) * model.itemsize
    sums = 2 * model.layers * model.hidden * model.itemsize
    per_token = int(sums * 2 * (layout.tensor - 1) / layout.tensor)
    times = passes(work, layout, response) if layer_passes_gather(layout) else 1
    gathered = int(slices * (layout.shard - 1) / layout.shard) * times  # what a ring sends on
    tokens = sum(lengths) + len(lengths) * response
    return Traffic(population * EXCHANGED, per_token, per_token * tokens * each, gathered, gathered * each)


def seconds(
    model: Model,
    layout: Layout,
    work: Work,
    restore: Restore,
    population: int,
    response: int,
    device: Device,
    machine: Machine,
) -> Seconds:
    """An iteration at a device's full speed, with responses of `response` tokens, evaluations of the center left out.

    A decode step reads the weights once and each row's cache; where rows are many, its operations take longer.
    """
    each = members(layout, population)
    elements = sum(model.held(layout.tensor, layout.shard, 0, 0))
    if restore is Restore.copy:
        perturb = elements * (4 / device.host + 1 / device.normals)
        update = elements * (8 / device.host + population / device.normals)
    else:
        perturb = 2 * elements * (2 * model.itemsize / device.memory + 1 / device.normals)
        update = elements * (2 * model.itemsize / device.memory + population / device.normals)
    sent = traffic(model, layout, work, population, response)
    apart = layout.shard * layout.tensor > machine.per_node
    gather = sent.gathered / (device.network if apart else device.link)
    if layout.offload is Offload.cpu:
        times = passes(work, layout, response) if layout.gather is Gather.layer else 1
        gather += each * times * elements * model.itemsize / device.host
    reduce = sent.reduced_per_token / (device.network if layout.tensor > machine.per_node else device.link)
    cached = 2 * model.layers * model.key_value_heads * model.head_size * model.itemsize / layout.tensor
    prefill = decode = 0.0
    for rows, width in work.batches(work.of_rank(layout)[0]):
        waiting = 2 * model.layers * device.latency if layout.tensor > 1 else 0.0
        operations = 2 * _used(model, 1) / layout.tensor / device.flops  # of a token
        prefill += rows * width * (operations + reduce) + waiting
        reading = _used(model, rows) * model.itemsize / layout.tensor + rows * (width + response / 2) * cached
        decode += response * (max(reading / device.memory, rows * operations) + rows * reduce + waiting)
    return Seconds(each * perturb, gather, each * prefill, each * decode, update)


def _used(model: Model, rows: int) -> float:
    """The elements of which a forward pass of so many tokens makes use: of experts those that are chosen."""
    embedding = next((p.numel for p in model.parameters if "embed" in p.name), 0)
    looked_up = embedding if any(p.name == "lm_head.weight" for p in model.parameters) else 0
    dense = model.numel - model.experts_numel() - looked_up
    if not model.experts:
        return dense
    return dense + model.experts_numel() * (1 - (1 - model.experts_per_token / model.experts) ** rows)
