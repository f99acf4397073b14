"""Decoding of prompts, greedy or sampled, on a module that is ready.

It works on token ids and knows the tokenizer only to find stop strings. Rows that are finished leave the
batch, key-value cache included (but not with layers that keep a state of another kind). Token for token it
gives what transformers' `generate(do_sample=False)` does. A sampled response is a function of the model, the
prompt and a seed: which others are decoded beside it does not matter, nor how the model is sharded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import signature

import torch
import torch.distributed as dist
from transformers import (
    BatchEncoding,
    Cache,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from shardes.cache import BatchCache, cache_for
from shardes.config import ConfigError
from shardes.engines.vocabulary import VocabularyPart

Prompt = str | list[dict[str, str]]


@dataclass
class Decoder:
    """How responses are decoded.

    `eos` ends a response and is part of it; so does the first token that completes one of the `stop` strings.
    The key-value cache's memory is taken once and reused by later batches and calls.
    """

    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    eos: frozenset[int]
    stop: Sequence[str]
    batch_tokens: int
    _cache: BatchCache | None = field(default=None, init=False, repr=False)

    def __call__(
        self,
        module: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int] | None = None,
        vocabulary: VocabularyPart | None = None,
        lockstep: dist.ProcessGroup | None = None,
        poll: Callable[[], None] = lambda: None,
    ) -> list[list[int]]:
        """The response to each prompt, as token ids, in the order of the prompts.

        Args:
            module: a causal language model of transformers.
            prompts: token ids, at least one each.
            seeds: of each prompt's response, 64 bits, to sample it from the model's distribution (temperature 1);
                by default it is the greedy one.
            vocabulary: the part of the vocabulary that this rank's logits cover; all of it by default.
            lockstep: the ranks that must make the same number of forward passes, where a pass is collective
                over them although their prompts differ.
            poll: called before every decode step; what it raises ends the decoding.
        """
        responses: list[list[int]] = [[] for _ in prompts]
        device = next(module.parameters()).device
        with torch.no_grad():
            for rows in self._batches(prompts):
                chosen = None if seeds is None else [seeds[r] for r in rows]
                batch = self._decode(module, [prompts[r] for r in rows], chosen, device, vocabulary, lockstep, poll)
                for row, tokens in zip(rows, batch, strict=True):
                    responses[row] = tokens
            while lockstep is not None and any_unfinished(False, device, lockstep):
                module(torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
        return responses

    def _batches(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        return batches(list(map(len, prompts)), self.max_new_tokens, self.batch_tokens)

    def _decode(self, module, prompts, seeds, device, vocabulary, lockstep, poll) -> list[list[int]]:
        width = max(map(len, prompts))
        length = width + self.max_new_tokens
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * (len(p) + length - width) for p in prompts], device=device)
        positions = (mask[:, :width].cumsum(-1) - 1).clamp(min=0)
        cache = self._empty_cache(module, length)
        named = "cache" if "cache" in signature(module.forward).parameters else "past_key_values"  # by version
        responses: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))  # which prompt each row of the batch is
        going = [True] * len(rows)
        count = 0
        while True:
            poll()
            if lockstep is not None:
                any_unfinished(True, device, lockstep)
            logits = module(
                input_ids=ids,
                attention_mask=mask[:, :width],
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **{named: cache},
            ).logits[:, -1]
            if seeds is not None:
                noise = gumbel([seeds[row] for row in rows], count, module.config.get_text_config().vocab_size, device)
                first = 0 if vocabulary is None else vocabulary.first
                logits = logits.float() + noise[:, first : first + logits.shape[1]]
            count += 1
            tokens = logits.argmax(-1) if vocabulary is None else vocabulary.argmax(logits)
            for i, token in enumerate(tokens.tolist()):
                if going[i]:
                    responses[rows[i]].append(token)
                    going[i] = not self._finished(responses[rows[i]])
            if not any(going):
                return responses
            if not all(going) and cache is self._cache:
                kept = _compact(going)
                where = torch.tensor(kept, device=device)
                cache.batch_select_indices(where)
                tokens, mask, positions = tokens[where], mask[where], positions[where]
                rows, going = [rows[i] for i in kept], [True] * len(kept)
            ids, positions, width = tokens[:, None], positions[:, -1:] + 1, width + 1

    def _empty_cache(self, module: PreTrainedModel, length: int) -> Cache:
        if self._cache is None:
            self._cache = cache_for(module.config)
        if self._cache is None:
            return DynamicCache(config=module.config)
        self._cache.begin(length)
        return self._cache

    def _finished(self, response: list[int]) -> bool:
        if len(response) >= self.max_new_tokens or response[-1] in self.eos:
            return True
        if not self.stop:
            return False
        # A token is at least a character, so these hold any stop string that the last token completes;
        # the text before them only has to decode to something.
        tail = self.tokenizer.decode(response[-max(map(len, self.stop)) - 4 :])
        return any(stop in tail for stop in self.stop)


def batches(lengths: Sequence[int], max_new_tokens: int, batch_tokens: int) -> list[list[int]]:
    """Rows of prompts that are decoded together: alike in length, within the token budget."""
    found: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        tokens = lengths[row] + max_new_tokens
        if not found or (len(found[-1]) + 1) * tokens > batch_tokens:
            found.append([])
        found[-1].append(row)
    return found


def _compact(going: list[bool]) -> list[int]:
    """Which row each row of a smaller batch is: those that go on, the last ones in the places of the finished."""
    count = sum(going)
    movers = (row for row in range(count, len(going)) if going[row])
    return [row if going[row] else next(movers) for row in range(count)]


def gumbel(seeds: Sequence[int], step: int, vocab_size: int, device: torch.device) -> torch.Tensor:
    """Gumbel noise, float32 (rows, vocabulary): the argmax of its sum with logits is a sample of their softmax.

    A row's noise is a function of its seed and the step alone. CPUs and GPUs have generators of their own.
    """
    generator = torch.Generator(device)
    drawn = torch.empty(len(seeds), vocab_size, device=device)
    for row, seed in zip(drawn, seeds, strict=True):
        generator.manual_seed((seed + step * 0x9E3779B97F4A7C15) % 2**64)  # far from the seeds of other rows
        row.exponential_(generator=generator)
    return -drawn.log()


def any_unfinished(unfinished: bool, device: torch.device, group: dist.ProcessGroup) -> bool:
    """Whether any rank of the group has decoding left; every rank asks before each forward pass."""
    count = torch.tensor([int(unfinished)], device=device)
    dist.all_reduce(count, group=group)
    return count.item() > 0


def decoder(
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_tokens: int = 65536,
) -> Decoder:
    """A decoder with the end-of-sequence ids of a model's generation config."""
    eos = generation.eos_token_id
    ids = frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)
    return Decoder(tokenizer, max_new_tokens, ids, tuple(stop), batch_tokens)


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt: a str as it is, a list of messages through the tokenizer's chat template.

    Raises:
        ConfigError: no prompts, an empty one, or chat without a chat template.
    """
    if not prompts:
        raise ConfigError(
            "task: its list of prompts is empty; prompts(split) must give one at least, for train and for test"
        )
    encoded = []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        elif not isinstance(prompt, list):
            raise ConfigError(f"task: prompt {number} is neither a str nor a list of messages: {prompt!r}")
        elif tokenizer.chat_template is None:
            raise ConfigError(
                f"task: prompt {number} is a chat, but the tokenizer of {tokenizer.name_or_path} has no chat "
                "template; use an instruct model, or prompts that are plain strings"
            )
        else:
            chat = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
            assert isinstance(chat, BatchEncoding)
            ids = chat["input_ids"]
        if not ids:
            raise ConfigError(f"task: prompt {number} is empty")
        encoded.append(ids)
    return encoded
