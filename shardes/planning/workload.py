"""The prompts and responses of a run, as numbers of tokens."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardes.config.schema import Config, Decode
from shardes.es.population import check_prompts_per_iteration, held_out_numbers, select
from shardes.inference.buckets import attended_length, bucket, padded_length
from shardes.inference.generation import batches
from shardes.inference.prompts import Prompt, check_forms, encode
from shardes.planning.layouts import Layout
from shardes.sharding.model_directory import open_tokenizer
from shardes.tasks import configured_task, prompts_of

# Characters of a prompt per token, if the model has no tokenizer. SmolLM2's has 3.4 in Countdown.
CHARACTERS_PER_TOKEN = 3


@dataclass(frozen=True)
class Workload:
    """The lengths of the training and the held-out prompts, and the limits of decoding.

    Attributes:
        members: how many members answer side by side; 1: one after another.
        decode: with graph, rows and lengths are padded to those of fixed shapes.
    """

    train: tuple[int, ...]
    test: tuple[int, ...]
    max_new_tokens: int
    batch_tokens: int
    members: int = 1
    decode: Decode = Decode.eager

    @classmethod
    def of_run(cls, config: Config, train: Sequence[int], test: Sequence[int]) -> "Workload":
        """The workload of members one after another, of the lengths of the task's prompts."""
        size = config.task.prompts_per_iteration
        if size is not None:
            train = sorted(train)[-size:]  # the longest that an iteration may draw
        asked = held_out_numbers(config.eval.prompts, len(test))
        return cls(
            tuple(train),
            tuple(select(test, asked)),
            config.generation.max_new_tokens,
            config.generation.batch_tokens,
            decode=config.generation.decode,
        )

    def groups(self, members: int) -> Iterator[tuple[int, "Workload"]]:
        """How many groups of each size `members` make, as (number, workload of one group)."""
        full, rest = divmod(members, self.members)
        yield full, self
        if rest:
            yield 1, replace(self, members=rest)

    def whole(self, layout: Layout) -> int:
        """The `batch_tokens` with which the prompts of a group of members are one batch."""
        lengths = self.of_rank(layout)[0]
        return self.rows(len(lengths)) * self.length(max(lengths))

    def rows(self, count: int) -> int:
        """The rows with which `count` prompts are decoded."""
        return bucket(count) if self.decode is Decode.graph else count

    def length(self, width: int) -> int:
        """The tokens of a row's cache, of a prompt of `width` tokens and its longest response."""
        tokens = width + self.max_new_tokens
        return padded_length(tokens) if self.decode is Decode.graph else tokens

    def attended(self, width: int, response: int) -> float:
        """The tokens that a decode step attends to, on average over a response."""
        if self.decode is Decode.eager or response == 1:
            return width + response / 2
        total, tokens, end = 0, width + 1, width + response  # from a step's tokens to the last's
        while tokens < end:  # a length serves all steps up to it
            length = attended_length(tokens, self.length(width))
            total += length * (min(length + 1, end) - tokens)
            tokens = length + 1
        return total / (response - 1)

    def batches(self, lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(rows, longest prompt) of each batch."""
        for rows in batches(lengths, self.max_new_tokens, self.batch_tokens, decode=self.decode):
            yield len(rows), max(lengths[row] for row in rows)

    def of_rank(self, layout: Layout) -> list[list[int]]:
        """The lengths of the prompts that the first rank of the shard axis generates for at a time.

        The first list is for a group of members, the others are for the center.
        """
        center = [
            list(split[:: min(layout.replicas, len(split))])
            for split in (self.train, self.test)
            if split
        ]
        return [lengths[:: layout.shard] for lengths in [list(self.train) * self.members, *center]]


def read_workload(config: Config, prompts: int | None, prompt_tokens: int | None) -> Workload:
    """The workload of the configured task.

    Args:
        prompts: the number of training prompts, in place of the task's.
        prompt_tokens: the length of every prompt, in place of the task's.

    Raises:
        ConfigError: the task cannot be used, or has no prompts for an iteration.
    """
    if prompts is not None and prompt_tokens is not None:
        lengths = {"train": [prompt_tokens] * prompts, "test": []}
    else:
        task = configured_task(config.task)
        lengths = {
            split: _lengths(config.model.path, prompts_of(task, split))
            for split in ("train", "test")
        }
        if prompts is None:
            check_prompts_per_iteration(config, len(lengths["train"]))
        if prompt_tokens is not None:
            lengths = {split: [prompt_tokens] * len(values) for split, values in lengths.items()}
        if prompts is not None:
            lengths["train"] = [max(lengths["train"])] * prompts
    return Workload.of_run(config, lengths["train"], lengths["test"])


def _lengths(path: str, prompts: Sequence[Prompt]) -> list[int]:
    """The prompts' lengths in tokens, estimated if there is no tokenizer."""
    directory = Path(path)
    if directory.is_dir() and any(directory.glob("tokenizer*")):
        tokenizer = open_tokenizer(directory)
        return [len(tokens) for tokens in encode(tokenizer, prompts)]
    check_forms(prompts)
    texts = (
        prompt if isinstance(prompt, str) else "".join(_text(message) for message in prompt)
        for prompt in prompts
    )
    return [-(-len(text) // CHARACTERS_PER_TOKEN) for text in texts]


def _text(message: Mapping[str, Any]) -> str:
    """The text of a message, whose content may be a list of parts, or calls of tools."""
    content = message.get("content")
    return content if isinstance(content, str) else str(content or message.get("tool_calls"))
