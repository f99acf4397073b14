"""The paper's conciseness task (arXiv 2509.24372, section 4.2): answer as briefly as possible."""

from collections.abc import Sequence

# Tables 4 and 5 of the paper: questions with their shortest right answers.
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
    """Short questions, put as chat. A response should be as long as the shortest right answer."""

    def prompts(self, split: str) -> list[str | list[dict[str, str]]]:
        """A chat of one user message for each question."""
        return [[{"role": "user", "content": question}] for question, _ in QUESTIONS[split]]

    def score(
        self, split: str, responses: list[str], which: Sequence[int] | None = None
    ) -> list[float]:
        """−|len(response) − len(answer)|, in characters.

        Raises:
            ValueError: the number of responses is not that of the questions.
        """
        questions = (
            QUESTIONS[split] if which is None else [QUESTIONS[split][number] for number in which]
        )
        if len(responses) != len(questions):
            raise ValueError(
                f"{len(responses)} responses for the {len(questions)} prompts of {split}"
            )
        return [
            -float(abs(len(response) - len(answer)))
            for response, (_, answer) in zip(responses, questions, strict=True)
        ]
