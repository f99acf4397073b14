"""Train a small base model for Countdown from scratch, on two cores in under ten minutes.

    python tools/make_countdown_base.py [models/countdown-base] [--steps 1200] [--seed 0]

Writes a Llama of a million parameters with a sentencepiece tokenizer as an ordinary model
directory. `train.json` and `test.json` in it hold 200 and 500 problems of three numbers that the
model was not trained on. Many of its training responses are wrong, so it knows their form but
solves only some problems, which leaves room for evolution strategies.
"""

import argparse
import io
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import sentencepiece
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    get_cosine_schedule_with_warmup,
)

from make_countdown import problems, solution, write
from shardes.tasks.countdown import evaluate

NUMBERS, LARGEST = [3], 20
TRAIN, TEST, PRETRAIN = 200, 500, 8000  # problems for ES, for testing, for this training
RIGHT, HASTY = 0.5, 0.35  # shares of the training responses
BATCH = 128
LEARNING_RATE = 2e-3
IGNORED = -100  # a label without a loss


def worked(rng: random.Random, problem: dict) -> str:
    """A response in steps. A wrong one claims that another expression equals the target."""
    a, b, c = problem["numbers"]
    others = [f"({a} + {b}) + {c}", solution(rng, problem["numbers"])]
    (expression,) = rng.choices([problem["solution"], *others], [RIGHT, HASTY, 1 - RIGHT - HASTY])
    first = re.search(r"\((\d+) . (\d+)\)", expression)
    assert first is not None
    try:
        inner = evaluate(first[0], [int(first[1]), int(first[2])])
    except ZeroDivisionError:
        return worked(rng, problem)
    second = expression.replace(first[0], str(inner))
    steps = f"{first[0][1:-1]} = {inner}, {second} = {problem['target']}"
    return f"{steps}</think>\n<answer>{expression}</answer>"


def make_tokenizer(texts: Iterable[str]) -> LlamaTokenizer:
    """A sentencepiece model. Pieces may span words: the prompt's phrases become few tokens."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=512,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_by_unicode_script=False,
        split_by_whitespace=False,
        split_digits=True,
        max_sentencepiece_length=512,
        minloglevel=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(model.getvalue())
        return LlamaTokenizer.from_pretrained(folder, add_bos_token=False)


def batch(
    tokenizer: LlamaTokenizer, texts: Sequence[tuple[str, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of (prompt, response) pairs, int64 [pairs, longest].

    Prompts and padding have the label IGNORED.
    """
    prompts = tokenizer([prompt for prompt, _ in texts])["input_ids"]
    whole = [
        [*ids, tokenizer.eos_token_id] for ids in tokenizer([a + b for a, b in texts])["input_ids"]
    ]
    ids = torch.full((len(whole), max(map(len, whole))), tokenizer.eos_token_id)
    labels = torch.full_like(ids, IGNORED)
    for row, (before, tokens) in enumerate(zip(prompts, whole, strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, len(before) : len(tokens)] = torch.tensor(tokens[len(before) :])
    return ids, labels


def train(
    tokenizer: LlamaTokenizer, pretrain: Sequence[dict], steps: int, seed: int
) -> LlamaForCausalLM:
    """Train a model with AdamW on `steps` batches of problems with new responses."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    ))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, 50, steps)
    started, recent = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        texts = [
            (problem["context"], worked(rng, problem)) for problem in rng.choices(pretrain, k=BATCH)
        ]
        ids, labels = batch(tokenizer, texts)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent += loss.item() / 100
        if step % 100 == 0:
            print(
                f"step {step} of {steps}: loss {recent:.3f}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
            recent = 0.0
    return model


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="tools/make_countdown_base.py",
    )
    parser.add_argument(
        "out", metavar="DIR", type=Path, nargs="?", default=Path("models/countdown-base")
    )
    parser.add_argument(
        "--steps", type=int, default=1200, help="training steps; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(argv)
    made = problems(options.seed, NUMBERS, LARGEST)
    options.out.mkdir(parents=True, exist_ok=True)
    write(options.out / "train.json", islice(made, TRAIN))
    write(options.out / "test.json", islice(made, TEST))
    pretrain = list(islice(made, PRETRAIN))
    rng = random.Random(options.seed)
    tokenizer = make_tokenizer(
        problem["context"] + worked(rng, problem) for problem in pretrain[:2000]
    )
    model = train(tokenizer, pretrain, options.steps, options.seed)
    tokenizer.save_pretrained(options.out)
    model.save_pretrained(options.out)
    print(
        f"{options.out}: {model.num_parameters():,} parameters, "
        f"{TRAIN} problems for training, {TEST} for testing"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
