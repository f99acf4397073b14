"""A replica's answers: what its model responds to prompts, and how likely it finds responses."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shardes.engines import Engine
from shardes.generation import Decoder
from shardes.likelihood import log_probs
from shardes.metrics import Clock
from shardes.world import World, all_gather


class Responder:
    """One replica's model with its decoder; every rank of the replica makes the same calls and gets all answers.

    The shard axis splits the prompts. `clock` sums up the seconds of the parts "gather", "generate" and "exchange";
    whoever wants them apart puts another in its place.
    """

    def __init__(self, world: World, engine: Engine, decoder: Decoder, tokenizer: PreTrainedTokenizerBase):
        self._world, self._engine, self._decoder, self._tokenizer = world, engine, decoder, tokenizer
        self._group = world.mesh.get_group("shard")
        self._rank, self._ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
        self.clock = Clock()

    def respond(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int] | None = None,
        poll: Callable[[], None] = lambda: None,
    ) -> list[list[int]]:
        """The live weights' response to each prompt, as token ids; `seeds` and `poll` as for `Decoder`."""
        mine = slice(self._rank, None, self._ranks)
        chosen = None if seeds is None else seeds[mine]
        with self._ready() as (module, where):
            found = self._decoder(module, prompts[mine], seeds=chosen, poll=poll, **where)
        return self._exchange(found, len(prompts), self._decoder.max_new_tokens, torch.long)

    def log_probs(
        self, prompts: Sequence[list[int]], responses: Sequence[list[int]], poll: Callable[[], None] = lambda: None
    ) -> list[list[float]]:
        """The live weights' log-probability of each token of each response; see `shardes.likelihood.log_probs`."""
        mine = slice(self._rank, None, self._ranks)
        with self._ready() as (module, where):
            found = log_probs(module, prompts[mine], responses[mine], poll=poll, **where)
        return self._exchange(found, len(prompts), max(map(len, responses), default=0), torch.float64)

    def texts(self, tokens: list[list[int]]) -> list[str]:
        return self._tokenizer.batch_decode(tokens, skip_special_tokens=True)

    @contextmanager
    def _ready(self) -> Iterator[tuple[PreTrainedModel, dict]]:
        lockstep = self._group if self._engine.lockstep else None
        with ExitStack() as stack:
            with self.clock("gather"):
                module = stack.enter_context(self._engine.ready())
            with self.clock("generate"):
                yield module, dict(vocabulary=self._engine.vocabulary, lockstep=lockstep)

    def _exchange(self, mine: Sequence[list], count: int, width: int, dtype: torch.dtype) -> list[list]:
        """All ranks' lists in prompt order, where rank r holds those of prompts r, r + ranks, ..."""
        if self._ranks == 1:
            return list(mine)
        with self.clock("exchange"):
            table = torch.zeros(-(-count // self._ranks), 1 + width, dtype=dtype, device=self._world.device)
            for row, values in zip(table, mine, strict=False):
                row[: 1 + len(values)] = torch.tensor([len(values), *values], dtype=dtype)
            tables = table.new_empty(self._ranks * len(table), 1 + width)
            all_gather(tables, table, group=self._group)
            rows = tables.view(self._ranks, *table.shape).transpose(0, 1).reshape(-1, 1 + width)[:count].tolist()
            return [row[1 : 1 + int(row[0])] for row in rows]
