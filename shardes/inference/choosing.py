"""Chooses each row's next token: the one with the largest logit, or a sample."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from shardes.engines.vocabulary import VocabularySlice
from shardes.inference.batch import Batch
from shardes.inference.processors import RowProcessors


def choose_token(
    module: PreTrainedModel,
    batch: Batch,
    step: int,
    logits: torch.Tensor,
    processors: RowProcessors | None,
    vocabulary: VocabularySlice | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's next token, and whether the largest of its logits is finite: one NaN makes it NaN.

    Args:
        logits: shape (rows, vocabulary or this rank's slice of it).
    """
    vocab_size = module.config.get_text_config().vocab_size
    if processors is not None:
        if vocabulary is not None:
            logits = vocabulary.complete(logits, vocab_size)
        width = batch.width
        scores = processors(batch.ids[:, :width], batch.mask[:, :width], batch.rows, logits)
        return scores.argmax(-1), logits.amax(-1).isfinite()
    if batch.seeds is not None:
        seeds = [batch.seeds[row] for row in batch.rows]
        logits = _add_noise(logits, gumbel(seeds, step, vocab_size, batch.device), vocabulary)
    return largest(logits, vocabulary)


def largest(
    logits: torch.Tensor, vocabulary: VocabularySlice | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `choose_token`, of logits as they are."""
    if vocabulary is not None:
        maxima, tokens = vocabulary.max(logits)
    else:
        tokens = logits.argmax(-1)
        maxima = logits.gather(-1, tokens[:, None])[:, 0]
    return tokens, maxima.isfinite()


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


def _add_noise(
    logits: torch.Tensor, noise: torch.Tensor, vocabulary: VocabularySlice | None
) -> torch.Tensor:
    """The sum in float32, where logits may cover a slice of the vocabulary and noise covers all."""
    first = 0 if vocabulary is None else vocabulary.first
    return logits.float() + noise[:, first : first + logits.shape[1]]
