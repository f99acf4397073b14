"""How likely a model finds given responses, token by token, and how far two models are apart by that."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from shardes.engines.vocabulary import VocabularyPart
from shardes.generation import any_unfinished

LOGITS = 1 << 27  # most logits of one forward pass


def log_probs(
    module: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    vocabulary: VocabularyPart | None = None,
    lockstep: dist.ProcessGroup | None = None,
    poll: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """The natural logarithm of the model's probability of each token of each response, at temperature 1.

    `prompts` and `responses` are token ids, as many of the one as of the other and none empty; the rest is as for
    `Decoder`.
    """
    found: list[list[float]] = [[] for _ in prompts]
    device = next(module.parameters()).device
    with torch.no_grad():
        for rows in _batches(responses, module.config.get_text_config().vocab_size):
            poll()
            if lockstep is not None:
                any_unfinished(True, device, lockstep)
            batch = _score(module, [prompts[r] for r in rows], [responses[r] for r in rows], device, vocabulary)
            for row, values in zip(rows, batch, strict=True):
                found[row] = values
        while lockstep is not None and any_unfinished(False, device, lockstep):
            module(torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    return found


def _batches(responses: Sequence[Sequence[int]], vocab_size: int) -> list[list[int]]:
    """Rows that are scored together: alike in length, their logits within the budget."""
    batches: list[list[int]] = []
    for row in sorted(range(len(responses)), key=lambda r: len(responses[r])):
        if not batches or (len(batches[-1]) + 1) * len(responses[row]) * vocab_size > LOGITS:
            batches.append([])
        batches[-1].append(row)
    return batches


def _score(module, prompts, responses, device, vocabulary) -> list[list[float]]:
    before, after = max(map(len, prompts)), max(map(len, responses))
    ids = torch.zeros(len(prompts), before + after, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        begin, end = before - len(prompt), before + len(response)
        ids[row, begin:end] = torch.tensor([*prompt, *response])
        mask[row, begin:end] = 1
    ids, mask = ids.to(device), mask.to(device)
    logits = module(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=after + 1,
    ).logits[:, :-1]
    tokens = ids[:, before:]
    if vocabulary is None:
        found = logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    else:
        found = vocabulary.log_probs(logits, tokens)
    return [values[: len(response)] for values, response in zip(found.tolist(), responses, strict=True)]


def k3(tuned: Sequence[float], base: Sequence[float]) -> float:
    """The mean per token of π_base/π − log(π_base/π) − 1 (equation 1; the k3 estimator of Schulman 2020), in nats.

    `tuned` and `base` are the log-probabilities that π and π_base give the tokens of one response drawn from π.
    It is at least 0, and its expectation is KL(π ‖ π_base).
    """
    ratios = [b - t for t, b in zip(tuned, base, strict=True)]
    return math.fsum(math.expm1(ratio) - ratio for ratio in ratios) / len(ratios)
