"""What an engine answers with its live weights: responses, and log-probabilities of responses."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

from transformers import PreTrainedModel

from shardes.clock import Clock
from shardes.distributed.store import no_poll
from shardes.distributed.world import World
from shardes.engines import ModuleEngine
from shardes.inference.generation import Decoder, ignore_members, ignore_response
from shardes.inference.log_probs import log_probs


class Generation(Protocol):
    """Answers prompts with an engine's live weights, as they are when a method is called.

    The ranks of the tensor axis make the same calls. The ranks of the shard axis call at the same
    times, each with its share of the prompts, which may be empty.

    Attributes:
        max_new_tokens: of the longest response.
    """

    max_new_tokens: int

    def responses(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int] | None = None,
        *,
        poll: Callable[[], None] = no_poll,
        members: Sequence[int] | None = None,
        set_members: Callable[[Sequence[int]], Hashable] = ignore_members,
        ended: Callable[[int, list[int]], None] = ignore_response,
    ) -> list[list[int]]:
        """The response to each prompt, as token ids; see `Decoder` for the arguments.

        It is empty where the logits were NaN or infinite.
        """
        ...

    def log_probs(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        poll: Callable[[], None] = no_poll,
    ) -> list[list[float]]:
        """The log-probability of each token of each response; see `inference.log_probs`."""
        ...

    def is_complete(self, response: Sequence[int]) -> bool:
        """Whether a response ended by itself: not at `max_new_tokens`, nor at invalid logits."""
        ...


class ModuleGeneration(Generation):
    """Generation with the module of transformers that an engine gathers, and the project's decoder.

    Args:
        clock: its parts "gather" and "generate" are timed.
    """

    def __init__(
        self, world: World, engine: ModuleEngine, decoder: Decoder, clock: Clock | None = None
    ):
        self._engine, self._decoder, self._clock = engine, decoder, clock or Clock()
        self._group = world.mesh.get_group("shard")
        self.max_new_tokens = decoder.max_new_tokens

    def responses(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int] | None = None,
        *,
        poll: Callable[[], None] = no_poll,
        members: Sequence[int] | None = None,
        set_members: Callable[[Sequence[int]], Hashable] = ignore_members,
        ended: Callable[[int, list[int]], None] = ignore_response,
    ) -> list[list[int]]:
        with self._gathered() as (module, parallelism):
            return self._decoder(
                module,
                prompts,
                seeds=seeds,
                members=members,
                set_members=set_members,
                poll=poll,
                ended=ended,
                **parallelism,
            )

    def log_probs(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        poll: Callable[[], None] = no_poll,
    ) -> list[list[float]]:
        with self._gathered() as (module, parallelism):
            return log_probs(module, prompts, responses, poll=poll, **parallelism)

    def is_complete(self, response: Sequence[int]) -> bool:
        return self._decoder.is_complete(response)

    @contextmanager
    def _gathered(self) -> Iterator[tuple[PreTrainedModel, dict]]:
        """The module, ready to compute, and the arguments that say how its ranks work together."""
        sync_forwards = self._group if self._engine.sync_forwards else None
        parallelism = dict(
            vocabulary=self._engine.vocabulary,
            sync_forwards=sync_forwards,
            device=self._engine.device,
        )
        with ExitStack() as stack:
            with self._clock("gather"):
                module = stack.enter_context(self._engine.gathered())
            with self._clock("generate"):
                yield module, parallelism
