"""A GPU that is not there: torch's fake tensors have a device, a dtype and a shape, and no values.

An operation on tensors of different devices raises, as it would on a machine with a GPU. On a build
of torch without CUDA, indexing in C++ asks for CUDA's device guard, so it is done here in Python.
What the code reads from a tensor is made up: integers 0, 1, 0, 1, ... and 1.0.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from shardes.noise import reference

CUDA = torch.device("cuda", 0)


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A context in which tensors are fake, and cuda:0 exists."""
    module = torch.get_device_module
    monkeypatch.setattr(
        torch, "get_device_module", lambda device: module("cpu" if device == CUDA else device)
    )
    # Triton launches no fake tensors, and the reference takes long.
    kernel = SimpleNamespace(add_noise=_add_noise, add_low_rank_noise=_add_noise)
    monkeypatch.setattr("shardes.noise._kernel", lambda device: kernel)
    monkeypatch.setattr(
        "shardes.sharding.weight_files._piece",  # safetensors makes real storage
        lambda source, shape, region: torch.zeros(region.rows, region.cols),
    )
    reference._table.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _Python():
            yield
    finally:
        reference._table.cache_clear()


def _add_noise(x, name, regions, seeds, coefficients, out, *low_rank) -> None:
    torch.ops.aten.copy_(out, x + torch.zeros(x.shape, device=CUDA))


class _Python(TorchFunctionMode):
    """Indexing without a device guard, and made-up values."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensor = args[0] if args else None
        if function is torch.Tensor.__getitem__:
            return _get(tensor, args[1])
        if function is torch.Tensor.__setitem__:
            return _set(tensor, *args[1:])
        if function is torch.Tensor.tolist:
            return _values(tensor.shape, tensor.dtype)
        if function in SCALARS:
            assert tensor.numel() == 1, "only one element has a value"
            return SCALARS[function](tensor.dtype)
        if function is torch.Tensor.nonzero:
            rows, device = min(len(tensor), 2), tensor.device
            return torch.zeros(rows, tensor.ndim, dtype=torch.long, device=device)
        if function is torch.Tensor.numpy:
            assert tensor.device.type == "cpu", "Numba has got a tensor of the GPU"
            return np.zeros(tensor.shape, str(tensor.dtype).removeprefix("torch."))
        if function is torch.Tensor.copy_:
            return torch.ops.aten.copy_(tensor, args[1])
        if function is torch.Tensor.contiguous:
            return tensor.clone(memory_format=torch.contiguous_format)
        return function(*args, **kwargs)


SCALARS = {
    torch.Tensor.item: lambda dtype: _values((), dtype),
    torch.Tensor.__int__: lambda dtype: 0,
    torch.Tensor.__float__: lambda dtype: 1.0,
    torch.Tensor.__bool__: lambda dtype: False,
    torch.Tensor.__index__: lambda dtype: 0,
}


def _values(shape, dtype: torch.dtype, number: int = 0):
    if len(shape):
        return [_values(shape[1:], dtype, number) for number in range(shape[0])]
    return 1.0 if dtype.is_floating_point else number % 2


def _get(tensor: torch.Tensor, index) -> torch.Tensor:
    view, indices = _view(tensor, index)
    return torch.ops.aten.index(view, indices) if indices else view


def _set(tensor: torch.Tensor, index, value) -> None:
    view, indices = _view(tensor, index)
    if indices:
        if not isinstance(value, torch.Tensor):
            value = torch.full((), value, dtype=tensor.dtype, device=tensor.device)
        torch.ops.aten.index_put_(view, indices, value)
    elif isinstance(value, torch.Tensor):
        torch.ops.aten.copy_(view, value)  # as C++ does, from any device
    else:
        torch.ops.aten.fill_(view, value)


def _view(tensor: torch.Tensor, index) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The view that slices and numbers describe, and what tensors index in it."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not any(part is Ellipsis for part in parts):
        parts.append(Ellipsis)
    at = next(i for i, part in enumerate(parts) if part is Ellipsis)
    used = sum(part is not None and part is not Ellipsis for part in parts)
    parts[at : at + 1] = [slice(None)] * (tensor.ndim - used)
    indices: list[torch.Tensor | None] = []
    dim = 0
    for part in parts:
        if part is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(part, slice):
            tensor = torch.ops.aten.slice(tensor, dim, part.start, part.stop, part.step or 1)
        elif isinstance(part, int):
            tensor = tensor.select(dim, part)
            continue
        else:
            assert isinstance(part, torch.Tensor), f"not indexed so here: {part!r}"
            indices += [None] * (dim - len(indices)) + [part]
        dim += 1
    return tensor, indices
