"""A key-value cache with memory that later batches reuse, and rows that can leave a batch."""

import torch
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class BatchCache(Cache):
    """The keys and values of one batch, written in place: a decode step copies no earlier ones.

    `begin` empties it for the next batch. Memory is allocated again only for a batch that needs
    more. Layers with a sliding window keep the full length, as in a `DynamicCache` without a
    config; their attention masks select the window.
    """

    def __init__(self) -> None:
        self.length = 0
        super().__init__(
            layer_class_to_replicate=lambda: Layer(self.length)  # type: ignore[arg-type]
        )

    def begin(self, length: int) -> None:
        """Empty the cache for rows of at most `length` tokens."""
        self.length = length
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.begin(length)


class Layer(DynamicLayer):
    """One layer: the first `_filled` tokens of two buffers, (rows, heads, length, head size).

    The buffers may have more rows than the batch.
    """

    buffers: list[torch.Tensor]

    def __init__(self, length: int):
        super().__init__()
        self._memory: list[torch.Tensor | None] = [None, None]  # of keys, of values
        self.begin(length)

    def begin(self, length: int) -> None:
        self._length = length
        self._filled = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        states = key_states, value_states
        if not self._filled:
            self.buffers = [self._allocate(i, new) for i, new in enumerate(states)]
        first, self._filled = self._filled, self._filled + key_states.shape[-2]
        assert self._filled <= self._length
        rows = len(key_states)
        for buffer, new in zip(self.buffers, states, strict=True):
            buffer[:rows, :, first : self._filled] = new
        self.keys, self.values = (buffer[:rows, :, : self._filled] for buffer in self.buffers)
        return self.keys, self.values

    def _allocate(self, i: int, new: torch.Tensor) -> torch.Tensor:
        """A buffer for states like `new`, in the memory of an earlier batch if that suffices."""
        shape = *new.shape[:2], self._length, new.shape[-1]
        memory = self._memory[i]
        size = torch.Size(shape).numel()
        if (
            memory is None
            or memory.numel() < size
            or (memory.dtype, memory.device) != (new.dtype, new.device)
        ):
            self._memory[i] = memory = None  # freed before more is allocated
            self._memory[i] = memory = torch.empty(size, dtype=new.dtype, device=new.device)
        return memory[:size].view(shape)

    def get_seq_length(self) -> int:
        return self._filled

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Row i becomes the former row `indices[i]`. Only rows whose place changes are copied."""
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        for i, buffer in enumerate(self.buffers):
            if len(moved):
                buffer[moved, :, : self._filled] = buffer[indices[moved], :, : self._filled]
            self.buffers[i] = buffer[: len(indices)]


def make_cache(config: PretrainedConfig) -> BatchCache | None:
    """A BatchCache, or None for a model in which some layers keep a state of another kind."""
    attention = (DynamicLayer, DynamicSlidingWindowLayer)
    layers = DynamicCache(config=config).layers
    return BatchCache() if all(type(layer) in attention for layer in layers) else None


def is_recurrent(config: PretrainedConfig) -> bool:
    """Whether no layer of a model attends to earlier tokens: each keeps a state instead."""
    layers = DynamicCache(config=config).layers
    return bool(layers) and not any(isinstance(layer, DynamicLayer) for layer in layers)
