"""Generation and log-probabilities with one replica's model."""

from collections.abc import Callable, Hashable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from shardes.clock import Clock
from shardes.config.schema import DType
from shardes.distributed.store import no_poll
from shardes.distributed.world import World, all_gather
from shardes.inference.engine_generation import Generation
from shardes.inference.generation import ignore_members, ignore_response


class Sampler:
    """Runs prompts through a replica's live weights.

    Every rank of the replica makes the same calls and gets the results of all prompts. The ranks of
    the shard axis hold the same model, so each works on its share of the prompts: rank r of R takes
    prompts r, r + R, r + 2R, ...

    Args:
        clock: its part "exchange" is timed.
    """

    def __init__(
        self,
        world: World,
        generation: Generation,
        tokenizer: PreTrainedTokenizerBase,
        clock: Clock | None = None,
    ):
        self._generation, self._tokenizer = generation, tokenizer
        self._clock = clock or Clock()
        self._device = world.device
        self._group = world.mesh.get_group("shard")
        self._ranks = self._group.size()
        self._share = slice(self._group.rank(), None, self._ranks)

    def generate(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int] | None = None,
        poll: Callable[[], None] = no_poll,
        members: Sequence[int] | None = None,
        set_members: Callable[[Sequence[int]], Hashable] = ignore_members,
        ended: Callable[[int, list[int]], None] = ignore_response,
    ) -> list[list[int]]:
        """The response to each prompt, as token ids; see `Decoder` for the arguments.

        It is empty where the logits were NaN or infinite, on every rank of the replica. With a
        shard axis, `ended` is told all responses at the end: until then, each rank knows its own.
        """
        tokens = self._generation.responses(
            prompts[self._share],
            None if seeds is None else seeds[self._share],
            poll=poll,
            members=None if members is None else members[self._share],
            set_members=set_members,
            ended=ended if self._ranks == 1 else ignore_response,
        )
        width = self._generation.max_new_tokens
        responses = self._exchange(tokens, len(prompts), width, torch.long)
        for number, response in enumerate(responses if self._ranks > 1 else ()):
            ended(number, response)
        return responses

    def log_probs(
        self,
        prompts: Sequence[list[int]],
        responses: Sequence[list[int]],
        poll: Callable[[], None] = no_poll,
    ) -> list[list[float]]:
        """The log-probability of each token of each response; see `inference.log_probs`."""
        share = self._share
        values = self._generation.log_probs(prompts[share], responses[share], poll=poll)
        longest = max(map(len, responses), default=0)
        return self._exchange(values, len(prompts), longest, torch.float64)

    def texts(self, tokens: list[list[int]]) -> list[str]:
        """The text of each response, without special tokens."""
        return self._tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def answer_kinds(self, tokens: Sequence[list[int]], texts: Sequence[str]) -> list[str]:
        """What is to be seen of each response without its reward: "empty" (no text), "unended" (cut
        off at max_new_tokens), or "whole".

        Args:
            texts: those of `tokens`; see `texts`.
        """
        return [
            "empty"
            if not text.strip()
            else "whole"
            if self._generation.is_complete(response)
            else "unended"
            for response, text in zip(tokens, texts, strict=True)
        ]

    def _exchange(
        self, share: Sequence[list], count: int, width: int, dtype: torch.dtype
    ) -> list[list]:
        """The lists of all `count` prompts, in order, from those of each rank's share.

        Args:
            width: length of the longest list.
        """
        if self._ranks == 1:
            return list(share)
        with self._clock("exchange"):
            # One row per prompt: the length of its list, then its elements.
            rows = -(-count // self._ranks)
            table = torch.zeros(rows, 1 + width, dtype=dtype, device=self._device)
            for row, values in zip(table, share, strict=False):
                row[: 1 + len(values)] = torch.tensor([len(values), *values], dtype=dtype)
            tables = table.new_empty(self._ranks * rows, 1 + width)
            all_gather(tables, table, group=self._group)
            by_rank = tables.view(self._ranks, rows, 1 + width)
            by_prompt = by_rank.transpose(0, 1).reshape(-1, 1 + width)[:count].tolist()
            return [row[1 : 1 + int(row[0])] for row in by_prompt]


def invalid_logits(responses: Sequence[list[int]], model: str, dtype: DType) -> dict[int, str]:
    """Which responses of `Sampler.generate` the model could not complete, and why.

    Args:
        model: its name in the reasons.
    """
    reason = (
        f"{model} gave logits that are NaN or infinite, in model.dtype={dtype.value}; use a dtype "
        "of larger range (bfloat16, float32) or a smaller es.sigma, and check the base model"
    )
    return {row: reason for row, response in enumerate(responses) if not response}
