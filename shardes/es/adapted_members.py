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
from shardes.engines.vllm import LAYER_NUMBER, VLLMEngine
from shardes.engines.vllm_adapters import Slots, Term
from shardes.errors import ConfigError, described
from shardes.es.matrix_layers import is_embedding, kind_of, matrix_layers
from shardes.es.population import Member
from shardes.es.side_by_side import ADAPTERS, answer_side_by_side
from shardes.es.update import evolves
from shardes.inference.vllm_generation import VLLMGeneration
from shardes.noise import LowRank, factors

PROBING = 1.0  # σ of the adapters that `AdaptedMembers.check` asks with: far above rounding


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

    def check(self, generation: VLLMGeneration) -> None:
        """See that vLLM answers each request of a batch with its own adapter. The values of the
        engine's shards end as zero.

        Of each kind of layer one is given adapters. They must change what a prompt gives, and give
        the same whether the other requests have the same adapter, another one or none.

        Raises:
            ConfigError: they do not; names the layer.
        """
        first: dict[str, str] = {}
        for path, *_ in self._layers:
            first.setdefault(LAYER_NUMBER.sub(".", path), path)
        members = [self._terms(Member(seed, PROBING)) for seed in (0, 1)]
        with self._engine.random_weights():
            plain = generation.following([None] * 3)[0]
            for path in first.values():
                requests = self._adapters.add([{path: terms[path]} for terms in members])
                try:
                    alone = [generation.following([request] * 3)[0] for request in requests]
                    mixed = generation.following([None, *requests])
                except Exception as error:  # whatever vLLM's code for adapters meets
                    raise _no_adapter(path, f"no working adapter ({described(error)})") from error
                self._adapters.remove(requests)
                expected = [plain, *alone]
                change = min(_distance(values, plain) for values in alone)
                if not change or max(map(_distance, mixed, expected)) > max(change, 1.0) / 50:
                    raise _no_adapter(path, "no adapter of its own for each request")

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


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def check_adapters(module: PreTrainedModel, es: ESConfig) -> None:
    """Raise ConfigError for experts that get noise: they have no adapters here."""
    for name, param in module.named_parameters():
        if param.ndim > 2 and evolves(es.evolve, es.rank, name, tuple(param.shape)):
            raise _no_adapter(name)


def _no_adapter(name: str, what: str = "no adapter") -> ConfigError:
    return ConfigError(
        f"es.members_per_batch: with engine=vllm members cannot share {name}, for which vLLM has "
        f"{what}; set es.members_per_batch=1, or leave it out of es.evolve"
    )


def adapter_slots(es: ESConfig) -> Slots | None:
    """The adapters that groups of members need; None: members answer one after another."""
    if not answer_side_by_side(es):
        return None
    return Slots(min(es.members_per_batch or ADAPTERS, es.population_size), es.rank)
