"""A task as a class: answer in exactly three words."""

QUESTIONS = {
    "train": [
        "What is the sea like?",
        "Why do people sing?",
        "How does bread smell?",
        "What makes a good friend?",
        "What is winter like?",
        "Why do we sleep?",
    ],
    "test": [
        "What is a forest like?",
        "Why do children play?",
        "What makes a good story?",
        "How does rain sound?",
    ],
}


class ThreeWords:
    def prompts(self, split):
        """Lists of messages go through the model's chat template; strings are used as raw text."""
        return [
            [{"role": "user", "content": f"{question} Answer in exactly three words."}]
            for question in QUESTIONS[split]
        ]

    def score(self, split, responses):
        """Higher is better: minus the number of missing or surplus words."""
        return [-float(abs(len(response.split()) - 3)) for response in responses]

    def correct(self, split, responses):
        """Optional: whether each response is right, for held_out_accuracy."""
        return [len(response.split()) == 3 for response in responses]
