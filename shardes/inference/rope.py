"""Rotary scaling that depends on a sequence's length: transformers' rope types longrope, dynamic.

transformers chooses the frequencies of a whole batch by its longest row. Rows share a batch here
only if each would have the same frequencies alone, at every step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class LengthScaling:
    """How a model's rotary frequencies depend on the length.

    Attributes:
        boundaries: the lengths beyond which the frequencies change.
        dynamic: whether, beyond the boundary, every length has frequencies of its own.
    """

    boundaries: frozenset[int]
    dynamic: bool

    def regime(self, first: int, last: int) -> int:
        """Sequences of equal regimes may share a batch while they grow from `first` to `last`
        tokens.

        The regime is 0 if they stay within all boundaries, −1 if they are beyond them all the time
        with the same frequencies, else their first length.
        """
        if last <= min(self.boundaries):
            return 0
        if not self.dynamic and first > max(self.boundaries):
            return -1
        return first


def length_scaling(module: PreTrainedModel) -> LengthScaling | None:
    """The model's scaling by length; None if its frequencies are the same for all lengths."""
    boundaries, dynamic = set(), False
    for rotary, rope_type, layer_type in _rotary_embeddings(module):
        if "dynamic" in rope_type:
            boundaries.add(rotary.original_max_seq_len)
            dynamic = True
        elif rope_type == "longrope":
            parameters = rotary.config.rope_parameters
            if layer_type is not None:
                parameters = parameters[layer_type]
            boundaries.add(parameters["original_max_position_embeddings"])
    return LengthScaling(frozenset(boundaries), dynamic) if boundaries else None


def reset(module: PreTrainedModel, device: torch.device) -> None:
    """Forget the lengths of earlier batches: dynamic frequencies grow with the longest so far."""
    position = torch.zeros(1, 1, dtype=torch.long, device=device)
    for rotary, rope_type, layer_type in _rotary_embeddings(module):
        if "dynamic" in rope_type:
            # A short sequence makes transformers restore the original frequencies.
            layer = {} if layer_type is None else {"layer_type": layer_type}
            rotary(torch.zeros(1, device=device), position, **layer)


def drops_cache(module: Any, ids: torch.Tensor, cache_parameter: str, cache: object) -> bool:
    """Whether `generate` would compute the keys and values of `ids` anew for the next token.

    Phi-3 does so when a sequence outgrows the boundary. Other models keep keys that were rotated by
    the earlier frequencies.

    Args:
        ids: prompts and responses so far, shape (rows, width), without padding.
        cache_parameter: the name of the parameter for the cache.
    """
    inputs = module.prepare_inputs_for_generation(
        ids, attention_mask=torch.ones_like(ids), use_cache=True, **{cache_parameter: cache}
    )
    return inputs.get(cache_parameter) is None


def _rotary_embeddings(module: PreTrainedModel) -> Iterator[tuple[Any, str, str | None]]:
    """The rotary embeddings, with their rope types and, if they have several, layer types."""
    for rotary in module.modules():
        rope_type = getattr(rotary, "rope_type", None)
        if isinstance(rope_type, str):
            yield rotary, rope_type, None
        elif isinstance(rope_type, dict):
            for layer_type, layer_rope_type in rope_type.items():
                yield rotary, layer_rope_type, layer_type
