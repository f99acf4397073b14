"""The forward passes of linear layers, whole or split, in both engines."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

TERM = "member_term"  # a layer's attribute: what it adds for the members that answer side by side


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`; on a CPU in float32 it uses oneDNN, as torch does for bfloat16.

    torch uses MKL for float32, which can take several times as long for the few rows of a decode
    step.
    """
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    if on_cpu and torch.backends.mkldnn.is_available() and not isinstance(weight, DTensor):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def use_own_forward(module: nn.Module) -> None:
    """Let the plain linear layers of a module use `forward`."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.forward = partial(forward, layer)  # type: ignore[method-assign]
        elif type(layer) is Conv1D:
            layer.forward = partial(forward_transposed, layer)  # type: ignore[method-assign]


def forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """A layer's output, with the term of the rows' members."""
    return add_term(layer, x, linear(x, layer.weight, layer.bias))


def forward_transposed(layer: Conv1D, x: torch.Tensor) -> torch.Tensor:
    """The output of a layer whose weight is transposed, as GPT-2's."""
    return add_term(layer, x, Conv1D.forward(layer, x))


def forward_row_parallel(
    all_reduce: Callable[..., object], layer: Any, x: torch.Tensor
) -> torch.Tensor:
    """The output of a layer that is split along its input: `all_reduce` sums the parts."""
    out = add_term(layer, x, linear(x, layer.weight))
    all_reduce(out, group=layer.mp_group)
    return out if layer.bias is None else out + layer.bias


def add_term(layer: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """y, to which the term of the rows' members is added in place, if there are any."""
    term = layer.__dict__.get(TERM)
    if term is not None:
        term(x, y)
    return y
