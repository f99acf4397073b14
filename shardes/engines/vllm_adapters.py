"""Terms of low rank beside a model's matrices, each for some requests: vLLM's multi-LoRA, with
adapters that are made in memory.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for; a smaller one is padded
EMBEDDINGS = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}


@dataclass(frozen=True)
class Slots:
    """How many adapters a batch may use at most, and their rank."""

    number: int
    rank: int

    def arguments(self) -> dict[str, Any]:
        """Arguments of vLLM's `LLM`."""
        rank = next(rank for rank in RANKS if rank >= self.rank)
        # On a CPU the head adds the last slot's term for requests without an adapter: one slot more
        # is there, which stays empty, for the first free one is taken.
        return dict(enable_lora=True, max_loras=self.number + 1, max_lora_rank=rank)


@dataclass(frozen=True)
class Term:
    """What an adapter adds to a layer's output y for an input x: outer·(inner·x), or outer·inner[x]
    of an embedding.

    Attributes:
        inner: (rank, inputs) inputs of an embedding are tokens.
        outer: (outputs, rank)
    """

    inner: torch.Tensor
    outer: torch.Tensor


class Adapters:
    """The adapters of an engine's requests.

    Args:
        llm: vLLM's engine, made with `Slots.arguments`.
    """

    def __init__(self, llm: Any):
        worker = llm.model_executor.driver_worker.worker
        self._manager = worker.model_runner.lora_manager
        self._manager._load_adapter = self._load
        self._made: dict[int, Any] = {}
        self._numbers = count(1)  # never used again: vLLM keeps what it knows by number

    def missing(self, layers: Collection[str]) -> list[str]:
        """The layers, by their names in transformers' model, that can have no terms."""
        known = self._manager._adapter_manager
        packed = {name for names in known.packed_modules.values() for name in names}
        return [layer for layer in layers if self._own(layer) not in packed | {*known.modules}]

    def add(self, adapters: Sequence[Mapping[str, Term]]) -> list[Any]:
        """Make an adapter of each mapping from layers to terms; returns vLLM's `LoRARequest`s."""
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.lora_weights import LoRALayerWeights
        from vllm.lora.request import LoRARequest

        requests = []
        dtype = self._manager.lora_config.lora_dtype
        for terms in adapters:
            number = next(self._numbers)
            layers = {}
            for layer, term in terms.items():
                rank, (inner, outer) = len(term.inner), (term.inner.to(dtype), term.outer.to(dtype))
                own = self._own(layer)
                layers[own] = LoRALayerWeights(own, rank, rank, inner, outer)
            self._made[number] = LoRAModel(number, rank, layers)
            requests.append(LoRARequest(f"member {number}", number, "in memory"))
        return requests

    def remove(self, requests: Sequence[Any]) -> None:
        for request in requests:
            self._manager.remove_adapter(request.lora_int_id)
            del self._made[request.lora_int_id]

    def _load(self, request: Any) -> Any:
        return self._made[request.lora_int_id].clone(request.lora_int_id)

    def _own(self, layer: str) -> str:
        """vLLM's name of a layer of transformers."""
        mapper = getattr(self._manager._adapter_manager.model, "hf_to_vllm_mapper", None)
        if mapper is None:
            return layer
        return mapper.get_rename_mapper()._map_name(f"{layer}.weight").removesuffix(".weight")
