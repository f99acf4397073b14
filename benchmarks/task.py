"""A task for measurements, with independent prompts and a cheap reward."""

import os

from benchmarks.generation import prompts


class Lengths:
    def prompts(self, split):
        return prompts(int(os.environ["BENCHMARK_PROMPTS"]) if split == "train" else 1)

    def score(self, split, responses):
        return [float(len(response)) for response in responses]
