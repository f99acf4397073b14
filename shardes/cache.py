"""The key-value cache of one batch: memory taken once, rows that leave it at will."""

import torch
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class BatchCache(Cache):
    """Keys and values of up to `length` tokens a row, written in place: no step copies what is there already.

    `begin` empties it for the next batch; its memory is taken anew only for a batch that needs more. Layers with a
    sliding window are kept at full length, as a `DynamicCache` without config does; their masks do the rest.
    """

    def __init__(self) -> None:
        self.length = 0
        super().__init__(layer_class_to_replicate=lambda: _Layer(self.length))  # type: ignore[arg-type]  # only called

    def begin(self, length: int) -> None:
        """Forget everything, and expect `length` tokens a row."""
        self.length = length
        for layer in self.layers:
            assert isinstance(layer, _Layer)
            layer.begin(length)


class _Layer(DynamicLayer):
    """One layer's keys and values: the first `_filled` tokens of buffers of shape (rows, heads, length, head size)."""

    def __init__(self, length: int):
        super().__init__()
        self._memory: list[torch.Tensor | None] = [None, None]
        self.begin(length)

    def begin(self, length: int) -> None:
        self._length = length
        self._filled = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        states = key_states, value_states
        if not self._filled:
            self._buffers = [self._take(which, new) for which, new in enumerate(states)]
        first, self._filled = self._filled, self._filled + key_states.shape[-2]
        assert self._filled <= self._length
        for buffer, new in zip(self._buffers, states, strict=True):
            buffer[:, :, first : self._filled] = new
        self.keys, self.values = (buffer[:, :, : self._filled] for buffer in self._buffers)
        return self.keys, self.values

    def _take(self, which: int, new: torch.Tensor) -> torch.Tensor:
        shape = *new.shape[:2], self._length, new.shape[-1]
        memory = self._memory[which]
        size = torch.Size(shape).numel()
        if memory is None or memory.numel() < size or (memory.dtype, memory.device) != (new.dtype, new.device):
            self._memory[which] = memory = None  # freed before its successor is there
            self._memory[which] = memory = torch.empty(size, dtype=new.dtype, device=new.device)
        return memory[:size].view(shape)

    def get_seq_length(self) -> int:
        return self._filled

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Row i becomes what row `indices[i]` was; only rows that move are copied, and none over a later source."""
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        for which, buffer in enumerate(self._buffers):
            if len(moved):
                buffer[moved, :, : self._filled] = buffer[indices[moved], :, : self._filled]
            self._buffers[which] = buffer[: len(indices)]


def cache_for(config: PretrainedConfig) -> BatchCache | None:
    """A BatchCache, if all layers of the model attend; None where some keep a state of another kind."""
    attending = (DynamicLayer, DynamicSlidingWindowLayer)
    return BatchCache() if all(type(layer) in attending for layer in DynamicCache(config=config).layers) else None
