"""Decoding of prompts, greedy or sampled.

Greedy decoding gives the tokens of transformers' `generate(do_sample=False)`. A sampled response is
a function of the model, the prompt and a seed: neither the batch nor the sharding of the model
matters.

A row leaves the batch, and the key-value cache, when its response ends. In models some of whose
layers keep a state other than keys and values, rows stay until the last response ends.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import signature

import torch
import torch.distributed as dist
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from shardes.distributed.store import no_poll
from shardes.engines.vocabulary import VocabularySlice
from shardes.inference.cache import BatchCache, make_cache
from shardes.inference.forward_sync import announce_forward, join_forwards


@dataclass
class Decoder:
    """Decodes prompts, given and returned as token ids, in batches.

    A response ends with an `eos` token, with the token that completes one of the `stop` strings
    (both are part of it), or after `max_new_tokens`. The tokenizer serves to find stop strings. The
    memory of the key-value cache is reused by later batches and calls.

    Args:
        batch_tokens: largest number of tokens of a batch, prompts and responses, with padding.
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
        vocabulary: VocabularySlice | None = None,
        sync_forwards: dist.ProcessGroup | None = None,
        poll: Callable[[], None] = no_poll,
    ) -> list[list[int]]:
        """The response to each prompt, in the order of the prompts.

        Args:
            module: a causal language model of transformers.
            prompts: token ids, at least one per prompt.
            seeds: one of 64 bits per prompt, to sample its response from the model's distribution
                at temperature 1. None: greedy decoding.
            vocabulary: the slice of the vocabulary that this rank's logits cover. None: they cover
                all.
            sync_forwards: the group whose ranks must make the same number of forward passes,
                because each pass is collective over it. None: a pass is not collective, or every
                rank of its group has the same prompts.
            poll: called before every decode step; what it raises ends the decoding.
        """
        responses: list[list[int]] = [[] for _ in prompts]
        device = next(module.parameters()).device
        with torch.no_grad():
            for rows in self._batches(prompts):
                batch = self._decode_batch(
                    module,
                    [prompts[row] for row in rows],
                    None if seeds is None else [seeds[row] for row in rows],
                    vocabulary,
                    sync_forwards,
                    poll,
                )
                for row, response in zip(rows, batch, strict=True):
                    responses[row] = response
            join_forwards(module, device, sync_forwards)
        return responses

    def _batches(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        return batches(list(map(len, prompts)), self.max_new_tokens, self.batch_tokens)

    def _decode_batch(
        self, module, prompts, seeds, vocabulary, sync_forwards, poll
    ) -> list[list[int]]:
        device = next(module.parameters()).device
        ids, mask, positions = _pad_left(prompts, self.max_new_tokens, device)
        width = ids.shape[1]  # tokens of a row so far, with padding
        cache = self._empty_cache(module, mask.shape[1])
        cache_argument = {_cache_parameter(module): cache}
        vocab_size = module.config.get_text_config().vocab_size
        responses: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))  # the prompt's number, for each row of the batch
        active = [True] * len(rows)
        for step in itertools.count():
            poll()
            announce_forward(device, sync_forwards)
            logits = module(
                input_ids=ids,
                attention_mask=mask[:, :width],
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **cache_argument,
            ).logits[:, -1]
            if seeds is not None:
                noise = gumbel([seeds[row] for row in rows], step, vocab_size, device)
                logits = _add_noise(logits, noise, vocabulary)
            tokens = logits.argmax(-1) if vocabulary is None else vocabulary.argmax(logits)
            for i, token in enumerate(tokens.tolist()):
                if active[i]:
                    response = responses[rows[i]]
                    response.append(token)
                    active[i] = not self._is_finished(response)
            if not any(active):
                break
            if not all(active) and cache is self._cache:
                kept = _compact(active)
                indices = torch.tensor(kept, device=device)
                cache.batch_select_indices(indices)
                tokens, mask, positions = tokens[indices], mask[indices], positions[indices]
                rows, active = [rows[i] for i in kept], [True] * len(kept)
            ids, positions, width = tokens[:, None], positions[:, -1:] + 1, width + 1
        return responses

    def _empty_cache(self, module: PreTrainedModel, length: int) -> Cache:
        if self._cache is None:
            self._cache = make_cache(module.config)
        if self._cache is None:
            return DynamicCache(config=module.config)
        self._cache.begin(length)
        return self._cache

    def _is_finished(self, response: list[int]) -> bool:
        if len(response) >= self.max_new_tokens or response[-1] in self.eos:
            return True
        if not self.stop:
            return False
        # A token has at least one character, so these tokens hold any stop string that the last one
        # completes. A few more in front do no harm.
        tail = self.tokenizer.decode(response[-max(map(len, self.stop)) - 4 :])
        return any(stop in tail for stop in self.stop)


def decoder(
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_tokens: int = 65536,
) -> Decoder:
    """A decoder with the end-of-sequence tokens of a model's generation config."""
    eos = generation.eos_token_id
    ids = frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)
    return Decoder(tokenizer, max_new_tokens, ids, tuple(stop), batch_tokens)


def batches(lengths: Sequence[int], max_new_tokens: int, batch_tokens: int) -> list[list[int]]:
    """The numbers of the prompts of each batch: of similar lengths, within the token budget.

    A prompt that exceeds the budget alone has a batch of its own.
    """
    grouped: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        tokens = lengths[row] + max_new_tokens
        if not grouped or (len(grouped[-1]) + 1) * tokens > batch_tokens:
            grouped.append([])
        grouped[-1].append(row)
    return grouped


def gumbel(seeds: Sequence[int], step: int, vocab_size: int, device: torch.device) -> torch.Tensor:
    """Gumbel noise, float32, (rows, vocab_size): argmax(logits + noise) is a sample of the softmax.

    A row's noise is a function of its seed, the step and the type of the device: CPUs and GPUs have
    different generators.
    """
    generator = torch.Generator(device)
    noise = torch.empty(len(seeds), vocab_size, device=device)
    for row, seed in zip(noise, seeds, strict=True):
        # The factor keeps a row's later seeds apart from the seeds of other rows.
        generator.manual_seed((seed + step * 0x9E3779B97F4A7C15) % 2**64)
        row.exponential_(generator=generator)
    return -noise.log()


def _cache_parameter(module: PreTrainedModel) -> str:
    """The name of the cache's parameter, which depends on the version of transformers."""
    return "cache" if "cache" in signature(module.forward).parameters else "past_key_values"


def _pad_left(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and positions of a batch; the mask also covers new tokens."""
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    ids = [[0] * n + list(prompt) for n, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * n + [1] * (width + max_new_tokens - n) for n in padding]
    mask_tensor = torch.tensor(mask, device=device)
    positions = (mask_tensor[:, :width].cumsum(-1) - 1).clamp(min=0)
    return torch.tensor(ids, device=device), mask_tensor, positions


def _add_noise(
    logits: torch.Tensor, noise: torch.Tensor, vocabulary: VocabularySlice | None
) -> torch.Tensor:
    """The sum in float32, where logits may cover a slice of the vocabulary and noise covers all."""
    first = 0 if vocabulary is None else vocabulary.first
    return logits.float() + noise[:, first : first + logits.shape[1]]


def _compact(active: list[bool]) -> list[int]:
    """The former row of each row of a smaller batch: the last active rows replace finished ones."""
    count = sum(active)
    moved = (row for row in range(count, len(active)) if active[row])
    return [row if active[row] else next(moved) for row in range(count)]
