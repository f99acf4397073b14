"""A task for measuring: prompts that have nothing to do with each other, a reward that costs nothing."""

import os

from benchmarks.generation import prompts


class Lengths:
    def prompts(self, split):
        return prompts(int(os.environ["BENCHMARK_PROMPTS"]) if split == "train" else 1)

    def score(self, split, responses):
        return [float(len(response)) for response in responses]
