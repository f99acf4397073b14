"""The paper's conciseness task (arXiv 2509.24372, section 4.2): answer in as few characters as it takes."""

from collections.abc import Sequence

# Tables 4 and 5 of the paper: question and shortest right answer.
QUESTIONS = {
    "train": [
        ("Solve: 3 + 5 =", "8"),
        ("If all birds can fly and penguins are birds, can penguins fly?", "No"),
    ],
    "test": [
        ("What is the capital of France?", "Paris"),
        ("Calculate: 12 × 7 =", "84"),
        ('Is the statement "All cats are mammals" true or false?', "True"),
        ("What comes next in the sequence: 2, 4, 6, 8, ?", "10"),
        ('Translate "Hello" to Spanish:', "Hola"),
        ("What is 15% of 200?", "30"),
        ("Name one primary color:", "Red"),
        ("How many days are in a week?", "7"),
    ],
}


class Conciseness:
    """Short questions put as chat; a response should be as long as the shortest right answer."""

    def prompts(self, split: str) -> list[str | list[dict[str, str]]]:
        """One chat of one user message per question."""
        return [[{"role": "user", "content": question}] for question, _ in QUESTIONS[split]]

    def score(self, split: str, responses: list[str], which: Sequence[int] | None = None) -> list[float]:
        """−|len(response) − len(solution)|, in characters.

        Raises:
            ValueError: not as many responses as there were questions.
        """
        asked = QUESTIONS[split] if which is None else [QUESTIONS[split][number] for number in which]
        if len(responses) != len(asked):
            raise ValueError(f"{len(responses)} responses for the {len(asked)} prompts of {split}")
        return [
            -float(abs(len(response) - len(solution))) for response, (_, solution) in zip(responses, asked, strict=True)
        ]
