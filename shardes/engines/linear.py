"""The forward passes of linear layers, whole or split, and of stacked experts, in both engines."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

TERM = "member_term"  # a layer's attribute: what it adds for the members that answer side by side
UP, GATE_UP, DOWN = "up_proj", "gate_up_proj", "down_proj"  # experts' stacks of a matrix for each


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
    """Let the plain linear layers and the experts of a module use the passes below."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.forward = partial(forward, layer)  # type: ignore[method-assign]
        elif type(layer) is Conv1D:
            layer.forward = partial(forward_transposed, layer)  # type: ignore[method-assign]
        elif are_experts(layer):
            layer.forward = partial(forward_experts, layer)


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


def are_experts(layer: nn.Module) -> bool:
    """Whether a layer is a stack of experts that `forward_experts` can compute: with transformers'
    interface for experts, without biases, and not transposed.
    """
    transposed, bias = (getattr(layer, name, True) for name in ("is_transposed", "has_bias"))
    return hasattr(layer, "has_gate") and not transposed and not bias


def forward_experts(
    layer: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The weighted sum of the outputs of each token's experts; without members, transformers' own.

    Args:
        hidden_states: shape (tokens, width).
        top_k_index, top_k_weights: of each token's experts, shape (tokens, experts per token).
    """
    term = layer.__dict__.get(TERM)
    if term is None:
        return type(layer).forward(layer, hidden_states, top_k_index, top_k_weights)
    count = top_k_index.shape[-1]
    chosen, scale = top_k_index.flatten(), top_k_weights.flatten()
    # Summed in the weights' dtype if that is wider, as transformers does.
    dtype = torch.promote_types(hidden_states.dtype, scale.dtype)
    out = hidden_states.new_empty(len(chosen), hidden_states.shape[-1], dtype=dtype)
    for expert in chosen.unique().tolist():
        pairs = (chosen == expert).nonzero()[:, 0]
        tokens = pairs // count

        def project(key: str, x: torch.Tensor, expert=expert, tokens=tokens) -> torch.Tensor:
            y = linear(x, getattr(layer, key)[expert])
            term(key, expert, tokens, len(hidden_states), x, y)
            return y

        if layer.has_gate:
            hidden = layer._apply_gate(project(GATE_UP, hidden_states[tokens]))
        else:
            hidden = layer.act_fn(project(UP, hidden_states[tokens]))
        hidden = project(DOWN, hidden)
        if layer.has_post_expert_norm:
            hidden = layer.post_expert_norm(hidden)
        out[pairs] = hidden * scale[pairs, None]
    return out.view(len(hidden_states), count, -1).sum(1).to(hidden_states.dtype)
