"""vLLM's CPU build computing with its parameters as they lie, which it would pack at loading."""

from functools import cache
from types import MappingProxyType
from typing import Any

import torch
import vllm.model_executor.layers.utils as layers
import vllm.triton_utils.dispatcher as dispatcher

from shardes.engines import linear


@torch.library.custom_op("shardes::linear", mutates_args=())
def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return linear.linear(x, weight, bias)


@_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@cache
def compute_in_place() -> None:
    """Let linear layers compute with their weights. Call it before a model is made."""
    layers.dispatch_cpu_unquantized_gemm = _use_linear
    dispatcher.vars = _attributes


def _use_linear(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = torch.ops.shardes.linear


def _attributes(value: Any) -> Any:
    """`vars`, or nothing where it gives no mapping: llvmlite has such an object, which vLLM meets
    among all modules.
    """
    found = vars(value)
    return found if isinstance(found, dict | MappingProxyType) else {}
