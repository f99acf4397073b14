"""A task whose rewards follow from every letter of a response."""


class Letters:
    def prompts(self, split):
        return ["abc", "a longer prompt", "x"] if split == "train" else ["hello", "world"]

    def score(self, split, responses, which=None):
        return [float(sum(map(ord, text)) % 97) for text in responses]
