"""The logits processors that a checkpoint's generation config asks for.

They are those of transformers' `generate(do_sample=False)`: repetition penalty, n-grams that must
not repeat, suppressed, forced and bad tokens, shortest lengths. A row gets the scores that it would
get alone, whatever the other rows of its batch are.
"""

from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from shardes.config.schema import LogitsProcessors
from shardes.errors import ConfigError, one_line

# These look at which tokens a row has, not at where they stand.
_BY_SET = (
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
# Keys that change `generate`'s tokens and are not supported, with the values that change nothing
_UNSUPPORTED: dict[str, tuple] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "guidance_scale": (None, 1),
    "encoder_repetition_penalty": (None, 1),
    "encoder_no_repeat_ngram_size": (None, 0),
    "watermarking_config": (None,),
    "token_healing": (None, False),
    "max_time": (None,),
}
# Keys that greedy decoding honours, with the values that change nothing
_HONOURED: dict[str, tuple] = {
    "repetition_penalty": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "stop_strings": (None, []),
}


class RowProcessors:
    """Applies a generation config's logits processors to the rows of one batch.

    Args:
        generation: a checkpoint's generation config.
        prompt_lengths: the number of tokens of each prompt of the batch.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        generation: GenerationConfig,
        max_new_tokens: int,
        prompt_lengths: Sequence[int],
        device: torch.device,
    ):
        self._lengths = prompt_lengths
        self._by_length = {
            length: _logits_processors(module, generation, max_new_tokens, length, device)
            for length in set(prompt_lengths)
        }
        any_list = next(iter(self._by_length.values()))
        self.active = len(any_list) > 0
        self._by_set = all(isinstance(processor, _BY_SET) for processor in any_list)

    def __call__(
        self, ids: torch.Tensor, mask: torch.Tensor, rows: Sequence[int], logits: torch.Tensor
    ) -> torch.Tensor:
        """The processed scores, float32, of the shape of `logits`.

        Args:
            ids: prompts and responses so far, shape (rows, width), padded on the left.
            mask: 1 where `ids` has a token, 0 where it has padding.
            rows: the prompt's number, for each row.
            logits: of all tokens of the vocabulary, shape (rows, vocabulary).
        """
        scores = logits.float()
        if self._by_set:
            # The last token stands in place of the padding: it is in each row's set in any case.
            sequences = ids.where(mask.bool(), ids[:, -1:])
            return next(iter(self._by_length.values()))(sequences, scores)  # type: ignore[arg-type]
        scores = scores.clone()
        padding = (mask == 0).sum(-1).tolist()
        groups: dict[int, list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            groups[self._lengths[row]].append(i)
        for length, group in groups.items():
            index = torch.tensor(group, device=ids.device)
            sequences = ids[index, padding[group[0]] :]
            scores[index] = self._by_length[length](sequences, scores[index])  # type: ignore[arg-type]
        return scores


def _logits_processors(
    module: Any,
    generation: GenerationConfig,
    max_new_tokens: int,
    prompt_length: int,
    device: torch.device,
) -> LogitsProcessorList:
    """The logits processors that `generate` makes for one prompt, without those of sampling."""
    config = deepcopy(generation)
    config.do_sample = False
    config.max_new_tokens = max_new_tokens
    config.max_length = prompt_length + max_new_tokens
    module._prepare_special_tokens(config, device=device)
    return module._get_logits_processor(
        config, input_ids_seq_length=prompt_length, device=str(device)
    )


def checkpoint_generation_config(
    directory: Path,
    module: PreTrainedModel,
    max_new_tokens: int,
    logits_processors: LogitsProcessors = LogitsProcessors.checkpoint,
) -> GenerationConfig:
    """The generation config of a model directory.

    Raises:
        ConfigError: it cannot be read; its end-of-sequence tokens are no token ids; or its logits
            processors are to be applied, and it has a key that is not supported or a value that
            transformers rejects.
    """
    try:
        if (directory / GENERATION_CONFIG_NAME).exists():
            generation = GenerationConfig.from_pretrained(directory)
        elif (directory / CONFIG_NAME).exists():
            generation = GenerationConfig.from_pretrained(
                directory, config_file_name=CONFIG_NAME, _from_model_config=True
            )
        else:
            generation = GenerationConfig.from_model_config(module.config)
    except Exception as error:  # whatever transformers meets in a file that is not as it expects it
        raise ConfigError(
            f"model.path={directory}: generation_config.json: {one_line(error)}"
        ) from error
    eos = generation.eos_token_id
    for token in eos if isinstance(eos, list) else [eos]:
        if token is not None and type(token) is not int:
            raise ConfigError(
                f"model.path={directory}: eos_token_id={eos!r} of its generation config must be a "
                "token id or a list of them"
            )
    if logits_processors is LogitsProcessors.checkpoint:
        _check(str(directory), module, generation, max_new_tokens)
    return generation


def _check(
    model: str, module: PreTrainedModel, generation: GenerationConfig, max_new_tokens: int
) -> None:
    remedy = (
        "remove it there, or set generation.logits_processors=none, which takes the largest logit "
        "of every step"
    )
    for key, neutral in _UNSUPPORTED.items():
        value = getattr(generation, key, None)
        if value not in neutral:
            raise ConfigError(
                f"model.path={model}: its generation config has {key}={value!r}, which greedy "
                f"decoding does not support; {remedy}"
            )
    vocab_size = module.config.get_text_config().vocab_size
    cpu = torch.device("cpu")
    ids = torch.zeros(1, 1, dtype=torch.long)
    try:
        processors = RowProcessors(module, generation, max_new_tokens, [1], cpu)
        processors(ids, torch.ones_like(ids), [0], torch.zeros(1, vocab_size))
    except Exception as error:  # as above
        raise ConfigError(
            f"model.path={model}: its generation config ({active_keys(generation)}) is not one "
            f"that transformers accepts: {one_line(error)}; {remedy}"
        ) from error


def active_keys(generation: GenerationConfig) -> str:
    """The keys that make greedy decoding differ from the largest logit, as "key=value, ..."."""
    return ", ".join(
        f"{key}={value!r}"
        for key, neutral in _HONOURED.items()
        if (value := getattr(generation, key, None)) not in neutral
    )
