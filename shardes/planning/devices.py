"""Rates of GPUs, from vendors' data sheets, and of this machine's CPU, measured.

The rates of GPUs are peaks. An `Estimate` takes all of them, so its times are lower bounds; what a
run reaches of them is an assumption: `SHARE`.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from shardes.engines.linear import linear, use_own_forward
from shardes.errors import ConfigError, suggestion
from shardes.inference.generation import Decoder
from shardes.noise import add_noise
from shardes.sharding.digest import digest
from shardes.sharding.regions import Region

LAYERS, STEPS = 12, 8  # of the model that `measured_cpu` times, and its decode steps
SHARE = 0.5  # of the peak rates that a run is assumed to reach on GPUs. None was measured.


@dataclass(frozen=True)
class Device:
    """A device's memory in bytes, and its rates per second: bytes, operations, values of ε.

    Links count one direction, per device.
    """

    capacity: float
    bandwidth: float  # of its memory
    flops: float  # dense bfloat16
    link: float  # to devices of the node
    network: float  # to other nodes
    host: float  # PCIe
    normals: float  # ε from the noise kernel
    latency: float = 1e-5  # seconds that a sum over ranks takes at least
    overhead: float = 0.0  # seconds of a layer's forward pass besides reads and operations
    overlaps: bool = True  # reads and operations
    # Bytes that a row's low-rank term moves per element of its factors, on average over both: they
    # are gathered, one of them is scaled, and both are cast and read.
    term: float = 20.0
    # Elements per second of the center's digest in host memory. Of GPUs' hosts, it is assumed: a
    # core made 0.4e9.
    digests: float = 5e9
    # Values of ε per second that a rank's host makes for weights that lie there (offload). Of GPUs'
    # hosts, it is assumed: a core made 0.9e9.
    host_normals: float = 1e10


def _gpu(capacity: float, bandwidth: float, flops: float, *rates: float) -> Device:
    link, network, host, normals = rates
    return Device(
        capacity * 1e9,
        bandwidth * 1e9,
        flops * 1e12,
        link * 1e9,
        network * 1e9,
        host * 1e9,
        normals,
    )


# GB, GB/s, dense bfloat16 TFLOP/s, and GB/s in one direction of the link, the network and the host.
# From vendors' data sheets: SXM or OAM cards, with the network of their DGX or HGX systems (200 or
# 400 Gb/s per GPU). Cards without such a system have PCIe as their link, and 25 Gb/s is assumed.
# The normals per second were measured on one H100 (the update, N = 30); those of other cards, and
# the latency of a sum, are guesses.
GPUS = {
    "H100": _gpu(80, 3350, 989, 450, 50, 64, 3.1e11),
    "H200": _gpu(141, 4800, 989, 450, 50, 64, 3.1e11),
    "B200": _gpu(180, 8000, 2250, 900, 50, 64, 3.1e11),
    "A100-40": _gpu(40, 1555, 312, 300, 25, 32, 1.5e11),
    "A100-80": _gpu(80, 2039, 312, 300, 25, 32, 1.5e11),
    "L40S": _gpu(48, 864, 362, 32, 3.1, 32, 1.5e11),
    "L4": _gpu(24, 300, 121, 32, 3.1, 32, 6e10),
    "A10": _gpu(24, 600, 125, 32, 3.1, 32, 6e10),
    "4090": _gpu(24, 1008, 165, 32, 3.1, 32, 1.5e11),
    "3090": _gpu(24, 936, 71, 32, 3.1, 32, 6e10),
    "MI300X": _gpu(192, 5300, 1307, 448, 50, 64, 3.1e11),
}


def gpu(name: str) -> Device:
    """The card of that name, in any case; ConfigError if it is not known."""
    for known, device in GPUS.items():
        if known.lower() == name.lower():
            return device
    known_names = [*GPUS, "cpu"]
    raise ConfigError(f"--gpu {name}: not known; {suggestion(name.upper(), known_names)}")


def slowest_gpu(memory: int) -> str:
    """The name of the card with the least bandwidth among those of about this memory, in bytes.

    Raises:
        ConfigError: no known card has within a tenth of it.
    """
    alike = [name for name, card in GPUS.items() if abs(card.capacity - memory) < memory / 10]
    if not alike:
        raise ConfigError(
            f"--gpu-memory {memory / 1e9:g}GB: no known card has that memory, so its rates are "
            f"unknown; name one beside it: --gpu {', '.join(GPUS)}"
        )
    return min(alike, key=lambda name: GPUS[name].bandwidth)


def measured_cpu(
    ranks: int, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter
) -> Device:
    """This machine's CPU as `ranks` ranks share it, measured in about a second.

    The link between ranks is assumed to be half of the memory's bandwidth, and a sum to take 20 µs.
    """
    fastest = partial(_fastest, clock)
    weights = torch.randn(64, 1024, 1024).to(dtype)  # larger than caches, in matrices of a layer
    one, many = (torch.randn(rows, 1024).to(dtype) for rows in (1, 32))

    def multiply(rows: torch.Tensor) -> None:
        for weight in weights:
            linear(rows, weight)

    read, both = (fastest(partial(multiply, rows)) for rows in (one, many))
    bandwidth = weights.nbytes / read
    # The time of a product grows linearly with the rows, from that of one row, unless other
    # programs took the cores meanwhile.
    rows, spent = (len(many) - 1, both - read) if both > 1.5 * read else (len(many), both)
    flops = 2 * rows * weights.numel() / spent
    values = torch.zeros(1 << 22)
    whole = (Region.contiguous(0, values.numel()),)
    normals = values.numel() / fastest(lambda: add_noise(values, "measured", whole, [1], [0.1]))
    digests = values.numel() / fastest(lambda: digest("measured", whole, values))
    return Device(
        capacity=0,
        bandwidth=bandwidth / ranks,
        flops=flops / ranks,
        link=bandwidth / 2 / ranks,
        network=float("inf"),
        host=bandwidth / ranks,  # the center is in the same memory
        normals=normals / ranks,
        latency=2e-5,
        overhead=_layer_overhead(fastest),
        overlaps=False,
        term=4.0,  # read in place
        digests=digests / ranks,
    )


def _layer_overhead(fastest: Callable[[Callable[[], object]], float]) -> float:
    """A decoder layer's share of a decode step that has next to no reads and operations."""
    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=2,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config).eval()
    use_own_forward(model)
    decode = Decoder(PreTrainedTokenizerBase(), STEPS, frozenset(), (), 1 << 20)
    return fastest(lambda: decode(model, [[0], [0]])) / STEPS / LAYERS


def _fastest(clock: Callable[[], float], work: Callable[[], object]) -> float:
    """The shortest of a few calls, in seconds, after one that is not measured."""
    work()
    times = []
    for _ in range(5):
        began = clock()
        work()
        times.append(clock() - began)
    return min(times)


def with_rates(device: Device, rates: Mapping[str, float | None]) -> Device:
    """The device with the rates that are given."""
    given: dict[str, Any] = {name: rate for name, rate in rates.items() if rate is not None}
    return replace(device, **given)
