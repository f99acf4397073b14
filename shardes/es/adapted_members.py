"""Members of low-rank noise that answer side by side on vLLM: each is an adapter.

The term of a layer is that of `es.side_by_side`, computed by vLLM.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from math import sqrt

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shardes.clock import Clock
from shardes.config.schema import ESConfig
from shardes.engines.vllm import VLLMEngine
from shardes.engines.vllm_adapters import Slots, Term
from shardes.errors import ConfigError
from shardes.es.matrix_layers import is_embedding, kind_of, matrix_layers
from shardes.es.population import Member
from shardes.es.side_by_side import ADAPTERS, answer_side_by_side
from shardes.es.update import evolves
from shardes.noise import LowRank, factors


class AdaptedMembers:
    """Lets requests be answered by the weights of different members.

    Args:
        module: the model of transformers, on the meta device.

    Raises:
        ConfigError: vLLM has no adapter for a matrix that gets noise; names it.
    """

    def __init__(self, module: PreTrainedModel, engine: VLLMEngine, es: ESConfig):
        assert engine.adapters is not None
        self._engine, self._adapters, self._rank = engine, engine.adapters, es.rank
        shapes = {name: tuple(param.shape) for name, param in module.named_parameters()}
        paths = {layer: path for path, layer in module.named_modules()}
        self._layers = [
            (paths[layer], name, shapes[name], is_embedding(layer) or kind_of(layer) is Conv1D)
            for layer, _, name in matrix_layers(module, shapes, es.rank, es.evolve)
        ]
        if missing := self._adapters.missing([path for path, *_ in self._layers]):
            raise _no_adapter(missing[0])

    @contextmanager
    def members(self, members: Sequence[Member], clock: Clock) -> Iterator[None]:
        """A context in which requests can belong to these members, by their number in the group.

        Making their adapters counts as the clock's part "perturb".
        """
        with clock("perturb"):
            self._engine.requests = self._adapters.add([self._terms(m) for m in members])
        try:
            yield
        finally:
            self._adapters.remove(self._engine.requests)
            self._engine.requests = []

    def set_rows(self, members: Sequence[int]) -> Hashable:
        """Nothing: each request says whose it is."""
        return None

    def _terms(self, member: Member) -> dict[str, Term]:
        made: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # tied layers share it
        scale, terms = member.sigma / sqrt(self._rank), {}
        for layer, name, shape, is_transposed in self._layers:
            if name not in made:
                made[name] = factors(member.seed, name, LowRank(shape, self._rank))
            rows, cols = made[name]
            outer, inner = (cols, rows) if is_transposed else (rows, cols)
            terms[layer] = Term(inner.mT, outer * scale)
        return terms


def check_adapters(module: PreTrainedModel, es: ESConfig) -> None:
    """Raise ConfigError for experts that get noise: they have no adapters here."""
    for name, param in module.named_parameters():
        if param.ndim > 2 and evolves(es.evolve, es.rank, name, tuple(param.shape)):
            raise _no_adapter(name)


def _no_adapter(name: str) -> ConfigError:
    return ConfigError(
        f"es.members_per_batch: with engine=vllm members cannot share {name}, for which vLLM has "
        "no adapter; set es.members_per_batch=1, or leave it out of es.evolve"
    )


def adapter_slots(es: ESConfig) -> Slots | None:
    """The adapters that groups of members need; None: members answer one after another."""
    if not answer_side_by_side(es):
        return None
    return Slots(min(es.members_per_batch or ADAPTERS, es.population_size), es.rank)
