"""Log-probabilities of given responses, and an estimate of the KL divergence of two models."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from shardes.distributed.store import no_poll
from shardes.engines.vocabulary import VocabularySlice
from shardes.inference import rope
from shardes.inference.forward_sync import announce_forward, join_forwards

MAX_LOGITS = 1 << 27  # of one forward pass, over all its rows


def log_probs(
    module: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    vocabulary: VocabularySlice | None = None,
    sync_forwards: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
    poll: Callable[[], None] = no_poll,
) -> list[list[float]]:
    """The natural logarithm of the probability of each response's tokens, at temperature 1.

    Args:
        prompts: token ids, at least one per prompt.
        responses: token ids, one response per prompt.
        vocabulary, sync_forwards, device: as for `Decoder`.
        poll: called before every forward pass; what it raises ends the computation.
    """
    values: list[list[float]] = [[] for _ in prompts]
    device = device or next(module.parameters()).device
    with torch.no_grad():
        scaling = rope.length_scaling(module)
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
        regimes = [scaling.regime(length, length) if scaling else 0 for length in lengths]
        for rows in _batches(responses, module.config.get_text_config().vocab_size, regimes):
            if scaling:
                rope.reset(module, device)
            poll()
            announce_forward(device, sync_forwards)
            batch = _score(
                module,
                [prompts[row] for row in rows],
                [responses[row] for row in rows],
                device,
                vocabulary,
            )
            for row, row_values in zip(rows, batch, strict=True):
                values[row] = row_values
        join_forwards(module, device, sync_forwards)
    return values


def _batches(
    responses: Sequence[Sequence[int]], vocab_size: int, regimes: Sequence[int]
) -> list[list[int]]:
    """The numbers of the responses of each batch: of similar lengths, within MAX_LOGITS, of equal
    regimes (see `rope.LengthScaling`).
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(responses)), key=lambda r: (regimes[r], len(responses[r]))):
        full = not batches or (len(batches[-1]) + 1) * len(responses[row]) * vocab_size > MAX_LOGITS
        if full or regimes[batches[-1][-1]] != regimes[row]:
            batches.append([])
        batches[-1].append(row)
    return batches


def _score(module, prompts, responses, device, vocabulary) -> list[list[float]]:
    prompt_width, response_width = max(map(len, prompts)), max(map(len, responses))
    ids = torch.zeros(len(prompts), prompt_width + response_width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        begin, end = prompt_width - len(prompt), prompt_width + len(response)
        ids[row, begin:end] = torch.tensor([*prompt, *response])
        mask[row, begin:end] = 1
    ids, mask = ids.to(device), mask.to(device)
    logits = module(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=response_width + 1,
    ).logits[:, :-1]
    tokens = ids[:, prompt_width:]
    if vocabulary is None:
        values = logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    else:
        values = vocabulary.log_probs(logits, tokens)
    rows = zip(values.tolist(), responses, strict=True)
    return [row_values[: len(response)] for row_values, response in rows]


def k3(tuned: Sequence[float], base: Sequence[float]) -> float:
    """The mean over tokens of r − log(r) − 1, with r = π_base/π: the k3 estimator (Schulman 2020).

    It is not negative, and its expectation is KL(π ‖ π_base), in nats.

    Args:
        tuned, base: log-probabilities that π and π_base give the tokens of a response sampled from
            π.
    """
    log_ratios = [b - t for t, b in zip(tuned, base, strict=True)]
    return math.fsum(math.expm1(ratio) - ratio for ratio in log_ratios) / len(log_ratios)
