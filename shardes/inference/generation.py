"""Decoding of prompts, greedy or sampled.

Greedy decoding gives the tokens of transformers' `generate(do_sample=False)`, called for each
prompt alone. A sampled response is a function of the model, the prompt and a seed. Neither the
batch nor the sharding of the model matters.

A row leaves the batch, and the key-value cache, when its response ends. In models some of whose
layers keep a state other than keys and values, rows stay until the last response ends.
"""

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
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

from shardes.config.schema import Decode, LogitsProcessors
from shardes.distributed.store import no_poll
from shardes.engines.vocabulary import VocabularySlice
from shardes.errors import ConfigError, described
from shardes.inference import rope
from shardes.inference.batch import Batch
from shardes.inference.buckets import largest_bucket, padded_length
from shardes.inference.cache import BatchCache, is_recurrent, make_cache
from shardes.inference.choosing import choose_token, largest
from shardes.inference.decode_graph import DecodeGraphs
from shardes.inference.forward_sync import announce_forward, join_forwards
from shardes.inference.processors import RowProcessors, active_keys
from shardes.inference.stop_strings import StopStrings


def ignore_members(members: Sequence[int]) -> None:
    """For a batch whose rows are all the same model's."""


def ignore_response(number: int, response: list[int]) -> None:
    """For a caller who waits for all responses."""


INVALID = -1  # in place of a token that was chosen by a logit that is NaN or infinite


@dataclass
class Decoder:
    """Decodes prompts, given and returned as token ids, in batches.

    A response ends with an `eos` token, with the token that completes one of the `stop` strings
    (both are part of it), or after `max_new_tokens`. A response is empty if logits on its way were
    NaN or infinite. The tokenizer serves to find stop strings. The memory of the key-value cache is
    reused by later batches and calls.

    Args:
        batch_tokens: largest number of tokens of a batch, prompts and responses, with padding.
        generation: the generation config whose logits processors greedy decoding applies; None:
            none, the token with the largest logit.
        decode: graph: decode steps have fixed shapes and, on a GPU, are CUDA graphs; see
            `inference.decode_graph`.
    """

    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    eos: frozenset[int]
    stop: Sequence[str]
    batch_tokens: int
    generation: GenerationConfig | None = None
    decode: Decode = Decode.eager
    _cache: BatchCache | None = field(default=None, init=False, repr=False)
    _graphs: DecodeGraphs | None = field(default=None, init=False, repr=False)
    _decodes: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        self._stop_strings = StopStrings(self.tokenizer, self.stop) if self.stop else None

    @property
    def applied(self) -> str:
        """The keys of the generation config that change greedy tokens, as "key=value, ..."."""
        return active_keys(self.generation) if self.generation else ""

    def __call__(
        self,
        module: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int] | None = None,
        members: Sequence[int] | None = None,
        set_members: Callable[[Sequence[int]], Hashable] = ignore_members,
        vocabulary: VocabularySlice | None = None,
        sync_forwards: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        poll: Callable[[], None] = no_poll,
        ended: Callable[[int, list[int]], None] = ignore_response,
    ) -> list[list[int]]:
        """The response to each prompt, in the order of the prompts.

        Args:
            module: a causal language model of transformers.
            prompts: token ids, at least one per prompt.
            seeds: one of 64 bits per prompt, to sample its response from the model's distribution
                at temperature 1, without logits processors. None: greedy decoding.
            members: the number of the member that answers each prompt, if several answer side by
                side.
            set_members: told the members of a batch's rows before forward passes with them. Returns
                another value once tensors that these passes read for the members have moved.
            vocabulary: the slice of the vocabulary that this rank's logits cover. None: they cover
                all.
            sync_forwards: the group whose ranks must make the same number of forward passes,
                because each pass is collective over it. None: a pass is not collective, or every
                rank of its group has the same prompts.
            device: where the module computes. None: where its parameters lie, which may be
                elsewhere if they are offloaded.
            poll: called before every decode step; what it raises ends the decoding.
            ended: told each response when it ends, with the number of its prompt, while others go
                on.
        """
        responses: list[list[int]] = [[] for _ in prompts]
        device = device or next(module.parameters()).device
        scaling = rope.length_scaling(module)
        if self.decode is Decode.graph and self._graphs is None:
            self._graphs = DecodeGraphs(device)
        with torch.no_grad():
            for rows in self._batches(prompts, scaling):
                if scaling:
                    rope.reset(module, device)
                batch = Batch(
                    [prompts[row] for row in rows],
                    None if seeds is None else [seeds[row] for row in rows],
                    [] if members is None else [members[row] for row in rows],
                    self.max_new_tokens,
                    device,
                )
                steps = self._decode(
                    module, batch, scaling, set_members, vocabulary, sync_forwards, poll
                )
                for i in itertools.chain.from_iterable(steps):
                    responses[rows[i]] = batch.responses[i]
                    ended(rows[i], batch.responses[i])
            set_members([])
            join_forwards(module, device, sync_forwards)
        return responses

    def is_complete(self, response: Sequence[int]) -> bool:
        """Whether a response ended by itself: not at `max_new_tokens`, nor at invalid logits."""
        if not response:
            return False
        if len(response) < self.max_new_tokens or response[-1] in self.eos:
            return True
        return self.has_stop_string(response)

    def has_stop_string(self, response: Sequence[int]) -> bool:
        """Whether a response ends with a stop string."""
        return self._stop_strings is not None and self._stop_strings.end([list(response)])[0]

    def _batches(
        self, prompts: Sequence[Sequence[int]], scaling: rope.LengthScaling | None = None
    ) -> list[list[int]]:
        lengths = list(map(len, prompts))
        return batches(lengths, self.max_new_tokens, self.batch_tokens, scaling, self.decode)

    def _decode(
        self, module, batch: Batch, scaling, set_members, vocabulary, sync_forwards, poll
    ) -> Iterator[list[int]]:
        """Decode a batch; yields, after each step, the batch's prompts whose responses ended."""
        processors = self._processors(module, batch)
        choose = partial(choose_token, module, batch, processors=processors, vocabulary=vocabulary)
        name = _cache_parameter(module)
        if graphs := self._graphs:
            is_greedy = processors is None and batch.seeds is None
            output = partial(largest, vocabulary=vocabulary) if is_greedy else _alone
            graphs.begin(module, name, batch, output, kind=is_greedy)
        cache = graphs.cache if graphs else self._empty_cache(module, batch.ids.shape[1])
        first = 0  # of the tokens that the next forward pass computes
        set_members(batch.row_members)
        for step in itertools.count():
            poll()
            announce_forward(batch.ids.device, sync_forwards)
            width = batch.width
            is_crossing = scaling is not None and step > 0 and width - 1 in scaling.boundaries
            if is_crossing and rope.drops_cache(module, batch.ids[:, :width], name, cache):
                cache, first = self._empty_cache(module, batch.ids.shape[1]), 0
            if graphs and step:
                outputs = graphs.step(batch)
            else:
                outputs = (self._forward(module, batch, first, {name: cache}),)
            tokens, finite = outputs if len(outputs) == 2 else choose(step, *outputs)
            batch.append(tokens)
            going = list(batch.active)
            active = self._active(batch, tokens.where(finite, INVALID).tolist())
            yield [
                row
                for row, went, goes in zip(batch.rows, going, active, strict=True)
                if went and not goes
            ]
            if not any(active):
                break
            if graphs:
                graphs.keep(batch, active, set_members)
            elif not all(active) and cache is self._cache:
                cache.batch_select_indices(batch.keep(active))
                set_members(batch.row_members)
            first = width

    def _forward(
        self, module: PreTrainedModel, batch: Batch, first: int, cache: dict[str, Cache]
    ) -> torch.Tensor:
        """The logits after the batch's newest tokens; those before `first` are in the cache."""
        recurrent = is_recurrent(module.config)
        with self._explained(module):
            return module(
                input_ids=batch.ids[:, first : batch.width],
                # A state has no padding in it, and Mamba takes a mask for one of its inputs.
                attention_mask=None if first and recurrent else batch.mask[:, : batch.width],
                position_ids=batch.positions[:, first : batch.width],
                use_cache=True,
                logits_to_keep=1,
                **cache,
            ).logits[:, -1]

    @contextmanager
    def _explained(self, module: PreTrainedModel) -> Iterator[None]:
        """A context for a forward pass: until one has succeeded, what it raises is a ConfigError.

        Some architectures have caches or arguments of their own, which only their code knows.
        """
        try:
            yield
        except (AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
            if self._decodes:
                raise
            raise ConfigError(
                f"model.path: {type(module).__name__} does not decode with a batch and a key-value "
                f"cache of transformers ({described(error)}); use another model"
            ) from error
        self._decodes = True

    def _processors(self, module: PreTrainedModel, batch: Batch) -> RowProcessors | None:
        if self.generation is None or batch.seeds is not None:
            return None
        lengths = list(map(len, batch.prompts))
        processors = RowProcessors(
            module, self.generation, self.max_new_tokens, lengths, batch.ids.device
        )
        return processors if processors.active else None

    def _active(self, batch: Batch, tokens: list[int]) -> list[bool]:
        """Add each row's token to its response; whether the rows' responses go on."""
        active = batch.active
        for i, token in enumerate(tokens):
            if active[i]:
                response = batch.responses[batch.rows[i]]
                response.append(token)
                active[i] = len(response) < self.max_new_tokens and token not in self.eos
                if token == INVALID:
                    response.clear()
                    active[i] = False
        going = [i for i, is_active in enumerate(active) if is_active]
        if self._stop_strings and going:
            ends = self._stop_strings.end([batch.responses[batch.rows[i]] for i in going])
            for i, is_end in zip(going, ends, strict=True):
                active[i] = not is_end
        return active

    def _empty_cache(self, module: PreTrainedModel, length: int) -> Cache:
        if self._cache is None:
            self._cache = make_cache(module.config)
        if self._cache is None:
            return DynamicCache(config=module.config)
        self._cache.begin(length)
        return self._cache


def decoder(
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_tokens: int = 65536,
    logits_processors: LogitsProcessors = LogitsProcessors.checkpoint,
    decode: Decode = Decode.eager,
) -> Decoder:
    """A decoder with the settings of a model's generation config.

    Args:
        stop: strings that end a response.
        logits_processors: whether greedy decoding applies the config's logits processors and stop
            strings.
    """
    eos = generation.eos_token_id
    ids = frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)
    strings = list(stop)
    applied = logits_processors is LogitsProcessors.checkpoint
    if applied and (own := getattr(generation, "stop_strings", None)):
        strings += [string for string in ([own] if isinstance(own, str) else own) if string]
    return Decoder(
        tokenizer,
        max_new_tokens,
        ids,
        tuple(strings),
        batch_tokens,
        generation if applied else None,
        decode,
    )


def batches(
    lengths: Sequence[int],
    max_new_tokens: int,
    batch_tokens: int,
    scaling: rope.LengthScaling | None = None,
    decode: Decode = Decode.eager,
) -> list[list[int]]:
    """The numbers of the prompts of each batch: of similar lengths, within the token budget.

    A prompt that exceeds the budget alone has a batch of its own.

    Args:
        scaling: prompts of different regimes have batches of their own.
        decode: of `generation.decode`.
    """
    grouped: list[list[int]] = []
    last_regime = 0
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[row]
        tokens = length + max_new_tokens
        regime = scaling.regime(length, tokens - 1) if scaling else 0
        full = not grouped or len(grouped[-1]) >= rows_of_batch(tokens, batch_tokens, decode)
        if full or regime != last_regime:
            grouped.append([])
        grouped[-1].append(row)
        last_regime = regime
    return grouped


def rows_of_batch(tokens: int, batch_tokens: int, decode: Decode) -> int:
    """How many rows of `tokens` tokens the budget of a batch holds, or 0.

    What fills a batch to a fixed shape counts.
    """
    if decode is Decode.graph:
        return largest_bucket(batch_tokens // padded_length(tokens))
    return batch_tokens // tokens


def _alone(logits: torch.Tensor) -> tuple[torch.Tensor]:
    return (logits,)


def _cache_parameter(module: PreTrainedModel) -> str:
    """The name of the cache's parameter, which depends on the version of transformers."""
    return "cache" if "cache" in signature(module.forward).parameters else "past_key_values"
