"""A reward function for JSON lines: the right word, and little else."""

import re


def one_word(response: str, example: dict) -> float:
    """1 if the response contains the answer as a word, minus 0.02 per further character."""
    right = re.search(rf"\b{re.escape(example['answer'])}\b", response, re.IGNORECASE) is not None
    return float(right) - 0.02 * max(len(response) - len(example["answer"]), 0)
