r"""Trains a model with TRL's GRPO for some time; `benchmarks.grpo` starts its ranks.

    torchrun --nproc_per_node 2 -m benchmarks.grpo.trainer CONFIG OUT --seconds 420 --seed 0 \
        --learning-rate 3e-4 --responses 64

Writes the points of the curve, OUT/points.jsonl, and their models, OUT/models/STEP. The clock
starts with the first step and stands still while a model is saved.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.grpo.points import RANKS, SETTINGS, Points
from shardes.config import loading
from shardes.tasks import Task, configured_task


class Reward:
    """The task's reward, as TRL calls it. It counts the tokens of the responses that it is shown.

    Attributes:
        tokens: how many so far on this rank, with the tokens that end a response.
    """

    __name__ = "reward"  # TRL's name for it in its logs

    def __init__(self, task: Task):
        self._task, self.tokens = task, 0

    def __call__(
        self, completions: list[str], completion_ids: list[list[int]], number: list[int], **_
    ) -> list[float]:
        self.tokens += sum(map(len, completion_ids))
        return self._task.score("train", completions, number)


class SavePoints(TrainerCallback):
    """Saves the models of the curve's points, and ends the training when its time is up."""

    def __init__(self, out: Path, seconds: float, reward: Reward):
        self._models, self._seconds, self._reward = out / "models", seconds, reward
        self._points = Points(out, seconds)
        self._started = self._saving = 0.0

    def on_train_begin(self, args, state, control, **_):
        self._started = time.monotonic()

    def on_step_end(self, args, state, control, model, **_):
        now, step = time.monotonic(), state.global_step
        # The ranks' tokens are added; the time is rank 0's, so that all end at the same step.
        first = state.is_world_process_zero
        values = [self._reward.tokens, now - self._started - self._saving if first else 0.0]
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        tokens, seconds = int(sums[0]), float(sums[1])
        control.should_training_stop = seconds >= self._seconds
        if first and (self._points.due(seconds, tokens) or control.should_training_stop):
            model.save_pretrained(self._models / str(step))
            self._points.write(step, seconds, tokens)
            self._saving += time.monotonic() - now


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.grpo.trainer")
    parser.add_argument("config")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--responses", type=int, required=True)
    options = parser.parse_args(argv)
    config = loading.load(options.config, [])
    task = configured_task(config.task)
    reward = Reward(task)
    prompts = task.prompts("train")
    settings = yaml.safe_load(SETTINGS.read_text()) | dict(
        per_device_train_batch_size=options.responses // RANKS,
        max_completion_length=config.generation.max_new_tokens,
        learning_rate=options.learning_rate,
    )
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(config.model.path, dtype=config.model.dtype.value),
        reward,
        GRPOConfig(
            output_dir=str(options.out / "trl"),
            seed=options.seed,
            max_steps=1_000_000,  # the time ends the training
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        ),
        Dataset.from_dict({"prompt": prompts, "number": list(range(len(prompts)))}),
        processing_class=AutoTokenizer.from_pretrained(config.model.path),
        callbacks=[SavePoints(options.out, options.seconds, reward)],
    )
    trainer.train()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
