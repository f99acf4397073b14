"""A reward function for JSON lines: the right word, and little else."""

import re


def one_word(response: str, example: dict) -> float:
    """1 where the answer is among the response's words, less 0.02 for every further character."""
    right = re.search(rf"\b{re.escape(example['answer'])}\b", response, re.IGNORECASE) is not None
    return float(right) - 0.02 * max(len(response) - len(example["answer"]), 0)
