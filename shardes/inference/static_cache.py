"""A key-value cache of fixed shapes and addresses, as a captured decode step needs it."""

import torch

from shardes.inference.cache import BatchCache, Layer


class StaticCache(BatchCache):
    """The keys and values of one batch, of which decode steps of a fixed shape read and write.

    A prompt's forward pass is that of a `BatchCache`. A decode step works on the first `rows` rows
    and the first `attended` tokens of the memory, whether they are filled or not: its attention
    mask selects.

    Attributes:
        slot: shape (1,), int64: where the decode step writes, in each row.
        attended: tokens that the decode step attends to; 0: the next pass is that of the prompts.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.layer_class_to_replicate = lambda: _StaticLayer(self)  # type: ignore[assignment]
        self.slot = torch.zeros(1, dtype=torch.long, device=device)
        self.rows = self.attended = self.capacity = 0

    def begin(self, length: int, rows: int = 0) -> None:
        """Empty the cache for at most `rows` rows of at most `length` tokens."""
        self.capacity, self.attended = rows, 0
        super().begin(length)

    def select(self, indices: torch.Tensor, filled: int) -> None:
        """Row i becomes the former row `indices[i]`, of whose tokens `filled` are kept."""
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        if len(moved):
            for buffer in self.buffers():
                buffer[moved, :, :filled] = buffer[indices[moved], :, :filled]

    def buffers(self) -> list[torch.Tensor]:
        """The memory of all layers, each (rows, heads, length, head size)."""
        return [buffer for layer in self.layers for buffer in layer.buffers]  # type: ignore[union-attr]


class _StaticLayer(Layer):
    def __init__(self, cache: StaticCache):
        self._cache = cache
        super().__init__(cache.length)

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether the next pass has fixed shapes: then transformers always makes a mask."""
        return self._cache.attended > 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        cache = self._cache
        if not cache.attended:
            return super().update(key_states, value_states)
        views = [buffer[: cache.rows, :, : cache.attended] for buffer in self.buffers]
        for view, new in zip(views, (key_states, value_states), strict=True):
            view.index_copy_(2, cache.slot, new)
        return views[0], views[1]

    def _allocate(self, i: int, new: torch.Tensor) -> torch.Tensor:
        # What the mask hides must be finite: 0 · NaN is NaN.
        shape = self._cache.capacity, *new.shape[1:]
        return super()._allocate(i, new.new_empty(()).expand(shape)).zero_()

    def get_seq_length(self) -> int:
        # As with transformers' static layers, a tensor: the place is not part of the graph.
        return self._cache.slot[0] if self._cache.attended else self._filled  # type: ignore[return-value]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.attended or self._filled + query_length, 0
