"""A reward model: a sequence classifier of transformers marks all responses of a member at once.

Each worker process loads it once, at its first call. MODEL is a directory or a hub id; the
environment's REWARD_MODEL takes its place.
"""

import os
from functools import cache

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

MODEL = os.environ.get("REWARD_MODEL", "distilbert/distilbert-base-uncased-finetuned-sst-2-english")
LABEL = 1  # whose probability is the reward, if the model has several labels
DEVICE = "cpu"  # or "cuda": then the reward model needs its own share of the GPU's memory
BATCH = 32  # responses at a time


def score_batch(responses, examples):
    """A reward for each response. Models that take a question and an answer get `examples`, too:
    tokenizer([e["prompt"] for e in examples], responses, ...).
    """
    rewards = []
    for begin in range(0, len(responses), BATCH):
        rewards += marks(responses[begin : begin + BATCH])
    return rewards


@torch.inference_mode()
def marks(responses):
    """The model's only output, or the logarithm of a label's probability."""
    tokenizer, model = load()
    inputs = tokenizer(
        responses, padding=True, truncation=True, max_length=512, return_tensors="pt"
    )
    logits = model(**inputs.to(DEVICE)).logits.float()
    if logits.shape[1] == 1:
        return logits[:, 0].tolist()
    return logits.log_softmax(1)[:, LABEL].tolist()


@cache
def load():
    torch.set_num_threads(1)  # the other cores decode, and sums are the same on every machine
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForSequenceClassification.from_pretrained(
        MODEL, dtype=torch.float32, use_safetensors=True
    )
    return tokenizer, model.eval().to(DEVICE)
