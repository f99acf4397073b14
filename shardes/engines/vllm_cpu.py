"""What vLLM's CPU build does otherwise than an engine needs.

It packs weights at loading and computes with the packed ones. Here linear layers compute with the
weights as they lie, and experts, whose kernel takes packed ones alone, are packed again by
`pack_experts`.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import vllm.model_executor.layers.utils as layers
import vllm.triton_utils.dispatcher as dispatcher
from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

from shardes.distributed.world import World
from shardes.engines import linear

EXPERTS = "shardes_experts"  # of a layer: (its experts, their packed weights)


@torch.library.custom_op("shardes::linear", mutates_args=())
def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return linear.linear(x, weight, bias)


@_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@cache
def compute_in_place() -> None:
    """Let layers compute with their weights. Call it before a model is made."""
    layers.dispatch_cpu_unquantized_gemm = _use_linear
    dispatcher.vars = _attributes
    CPUUnquantizedExperts.process_weights_after_loading = _keep_weights
    CPUUnquantizedExperts.apply = _apply


@contextmanager
def own_shared_memory(world: World) -> Iterator[None]:
    """A context in which the replica's ranks, collectively, open shared memory of their own.

    By itself its name is the same for all replicas of a host. On exit the name is gone, so that no
    rank that ends leaves it behind.
    """
    name = f"shardes-{int(world.run_on_leader(lambda: float(secrets.randbits(52)))):x}"
    _CPUSHMDistributed.make_group_name = staticmethod(
        lambda communicator: f"{name}-{communicator.unique_name}"
    )
    try:
        yield
    finally:
        for file in Path("/dev/shm").glob(f"{name}-*"):
            file.unlink(missing_ok=True)


def pack_experts(model: Any) -> None:
    """Let the experts of a model of vLLM compute with the weights that its parameters have now."""
    for layer in model.modules():
        if EXPERTS in vars(layer):
            experts, packed = vars(layer)[EXPERTS]
            for old, new in zip(packed, _pack(experts, layer), strict=True):
                old.copy_(new)


def _use_linear(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = torch.ops.shardes.linear


_process = CPUUnquantizedExperts.process_weights_after_loading
_compute = CPUUnquantizedExperts.apply


def _keep_weights(experts: Any, layer: Any) -> None:
    experts.shardes_packed = _pack(experts, layer)
    vars(layer)[EXPERTS] = experts, experts.shardes_packed


def _pack(experts: Any, layer: Any) -> list[torch.Tensor]:
    """What vLLM makes of a layer's weights at loading; the layer keeps its own."""
    own = layer.w13_weight, layer.w2_weight
    _process(experts, layer)
    packed = layer.w13_weight, layer.w2_weight
    layer.w13_weight, layer.w2_weight = own
    return [weight.data for weight in packed]


def _apply(experts: Any, **arguments: Any) -> None:
    first, second = experts.shardes_packed
    _compute(experts, **(arguments | dict(w1=first, w2=second)))


def _attributes(value: Any) -> Any:
    """`vars`, or nothing where it gives no mapping: llvmlite has such an object, which vLLM meets
    among all modules.
    """
    found = vars(value)
    return found if isinstance(found, dict | MappingProxyType) else {}
