"""Greedy decoding of prompts, on a module that is ready.

It works on token ids and knows the tokenizer only to find stop strings. Rows that are finished leave the
batch, key-value cache included. Token for token it gives what transformers' `generate(do_sample=False)` does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerBase

from shardes.config import ConfigError

Prompt = str | list[dict[str, str]]


@dataclass
class Greedy:
    """How responses are decoded.

    `eos` ends a response and is part of it; so does the first token that completes one of the `stop` strings.
    """

    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    eos: frozenset[int]
    stop: Sequence[str]
    batch_tokens: int

    def __call__(
        self,
        module: nn.Module,
        prompts: Sequence[Sequence[int]],
        *,
        lockstep: dist.ProcessGroup | None = None,
        poll: Callable[[], None] = lambda: None,
    ) -> list[list[int]]:
        """The response to each prompt, as token ids, in the order of the prompts.

        Args:
            module: a causal language model of transformers.
            prompts: token ids, at least one each.
            lockstep: the ranks that must make the same number of forward passes, where a pass is collective
                over them although their prompts differ.
            poll: called before every decode step; what it raises ends the decoding.
        """
        responses: list[list[int]] = [[] for _ in prompts]
        device = next(module.parameters()).device
        with torch.no_grad():
            for rows in self._batches(prompts):
                batch = self._decode(module, [prompts[r] for r in rows], device, lockstep, poll)
                for row, tokens in zip(rows, batch, strict=True):
                    responses[row] = tokens
            while lockstep is not None and _any_unfinished(False, device, lockstep):
                module(torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
        return responses

    def _batches(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Rows of prompts that are decoded together: alike in length, within the token budget."""
        batches: list[list[int]] = []
        for row in sorted(range(len(prompts)), key=lambda r: len(prompts[r])):
            tokens = len(prompts[row]) + self.max_new_tokens
            if not batches or (len(batches[-1]) + 1) * tokens > self.batch_tokens:
                batches.append([])
            batches[-1].append(row)
        return batches

    def _decode(self, module, prompts, device, lockstep, poll) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=module.config)
        responses: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))  # which prompts the batch still holds
        while True:
            poll()
            if lockstep is not None:
                _any_unfinished(True, device, lockstep)
            out = module(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            tokens = out.logits[:, -1].float().argmax(-1)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                responses[row].append(token)
            going = [i for i, row in enumerate(rows) if not self._finished(responses[row])]
            if not going:
                return responses
            if len(going) < len(rows):
                kept = torch.tensor(going, device=device)
                cache.batch_select_indices(kept)
                tokens, mask, positions = tokens[kept], mask[kept], positions[kept]
                rows = [rows[i] for i in going]
            ids, positions = tokens[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)

    def _finished(self, response: list[int]) -> bool:
        if len(response) >= self.max_new_tokens or response[-1] in self.eos:
            return True
        if not self.stop:
            return False
        # A token is at least a character, so these hold any stop string that the last token completes;
        # the text before them only has to decode to something.
        tail = self.tokenizer.decode(response[-max(map(len, self.stop)) - 4 :])
        return any(stop in tail for stop in self.stop)


def _any_unfinished(unfinished: bool, device: torch.device, group: dist.ProcessGroup) -> bool:
    """Whether any rank of the group has decoding left; every rank asks before each forward pass."""
    count = torch.tensor([int(unfinished)], device=device)
    dist.all_reduce(count, group=group)
    return count.item() > 0


def greedy(
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_tokens: int = 65536,
) -> Greedy:
    """Greedy decoding with the end-of-sequence ids of a model's generation config."""
    eos = generation.eos_token_id
    ids = frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)
    return Greedy(tokenizer, max_new_tokens, ids, tuple(stop), batch_tokens)


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt: a str as it is, a list of messages through the tokenizer's chat template.

    Raises:
        ConfigError: no prompts, an empty one, or chat without a chat template.
    """
    if not prompts:
        raise ConfigError("task: its list of prompts is empty")
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
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        if not ids:
            raise ConfigError(f"task: prompt {number} is empty")
        encoded.append(ids)
    return encoded
