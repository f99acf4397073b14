"""Evaluates the models of a run on the test problems, with the same decoder for both methods."""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.grpo.points import REPORT
from shardes.config import loading
from shardes.engines.linear import use_own_forward
from shardes.inference.generation import decoder
from shardes.inference.processors import checkpoint_generation_config
from shardes.inference.prompts import encode
from shardes.sharding.model_directory import open_tokenizer
from shardes.storage import journal
from shardes.storage.export import center_of_run, write_export
from shardes.tasks import configured_task


class Evaluator:
    """Lets a config's model, or what was trained from it, answer the test problems."""

    def __init__(self, config_file: str):
        config = loading.load(config_file, [])
        self._base = Path(config.model.path)
        self._task = configured_task(config.task)
        self._tokenizer = open_tokenizer(self._base, False)
        self._prompts = encode(self._tokenizer, self._task.prompts("test"))
        self._new_tokens = config.generation.max_new_tokens

    def __call__(self, directory: Path | None, sample: bool) -> dict[str, int]:
        """The number of problems, and how many of them greedy answers solve.

        Args:
            directory: of the model; None: the base.
            sample: whether to count also what answers sampled at temperature 1 solve, one for each.
        """
        directory = directory or self._base
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        use_own_forward(model)
        generation = checkpoint_generation_config(self._base, model, self._new_tokens)
        decode = decoder(self._tokenizer, generation, max_new_tokens=self._new_tokens)
        seeds = np.random.SeedSequence(0).generate_state(len(self._prompts), np.uint64).tolist()
        counts = {"problems": len(self._prompts)}
        for name, chosen in (("correct", None), ("sampled_correct", seeds))[: 1 + sample]:
            responses = decode(model, self._prompts, seeds=chosen)
            texts = self._tokenizer.batch_decode(responses, skip_special_tokens=True)
            counts[name] = sum(self._task.correct("test", texts))
        return counts


def evaluate(out: Path) -> None:
    """Evaluate a run's points that are not evaluated yet, the last one and the base first.

    The first and the last are sampled too. OUT/run.json is written anew after each.
    """
    report = json.loads((out / REPORT).read_text())
    evaluator = Evaluator(report["config"])
    points = report["points"]
    for point in [points[-1], *points[:-1]]:
        if "correct" not in point:
            sample = point in (points[0], points[-1])
            point |= evaluator(_model(out, report["method"], point["step"]), sample)
            write_report(out, report)


def write_report(out: Path, report: dict) -> None:
    partial = out / f"{REPORT}.partial"
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(out / REPORT)


def _model(out: Path, method: str, step: int) -> Path | None:
    """The directory of the model after a number of steps; None if it is the base."""
    if step == 0:
        return None
    directory = out / "models" / str(step)
    if method == "es" and not directory.exists():
        run = out / "run"
        history = journal.read(run / journal.JOURNAL)
        assert history is not None
        write_export(center_of_run(run, history, None, step), directory, torch.float32, "5GB")
    return directory
