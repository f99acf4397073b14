"""Stop strings: the token at which a response ends, as transformers' `stop_strings` finds it."""

from collections.abc import Sequence
from contextlib import suppress

import torch
from transformers import PreTrainedTokenizerBase, StopStringCriteria


class StopStrings:
    """Recognizes responses whose last token completes one of several strings.

    transformers' criterion compares the bytes of tokens, so that it also finds a string beside
    bytes that are no text. Of tokenizers that do not tell it their bytes it knows too little; a
    string that stands in the decoded text ends a response in any case.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]):
        self._tokenizer, self._strings = tokenizer, strings
        # A token has at least one byte, so these tokens hold any string that the last one
        # completes. A few more in front do no harm.
        self._longest = max(len(string.encode()) for string in strings) + 4
        self._criteria: StopStringCriteria | None = None
        with suppress(ValueError):  # it knows no token that ends as one of the strings does
            self._criteria = StopStringCriteria(tokenizer, list(strings))

    def end(self, responses: Sequence[list[int]]) -> list[bool]:
        """Whether each response ends here. The responses have the same length, at least 1."""
        tails = [response[-self._longest :] for response in responses]
        ends = [self._is_in_text(tail) for tail in tails]
        if self._criteria:
            matches = self._criteria(torch.tensor(tails), None)
            ends = [end or match for end, match in zip(ends, matches.tolist(), strict=True)]
        return ends

    def _is_in_text(self, tokens: list[int]) -> bool:
        text = self._tokenizer.decode(tokens)
        return any(string in text for string in self._strings)
