"""Judge a model on a task's prompts: rewards, accuracy, and how far it has moved from its base.

    shardes evaluate CONFIG.yaml --gpus 2 --model DIR [--split test ...] [--samples 4] [--out FILE]
    deepspeed --num_gpus 2 launchers/evaluate.py CONFIG.yaml --model DIR [--split test ...] [--samples 4] [--out FILE]

CONFIG.yaml is that of the training run; its model.path is the base. DIR is the tuned model: a snapshot or an export.
Every prompt gets the greedy response and, with --samples n, n responses sampled at temperature 1, each a function of
es.seed, prompt and number. On these the base and the tuned model are compared: KL by the k3 estimator (the paper's
equation 1), in nats per token. FILE (default: evaluation.json in the working directory) holds the figures with 95 %
intervals, and every response.
"""

import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardes import environment

environment.prepare()
with environment.quiet():
    import deepspeed  # noqa: F401

import torch.distributed as dist  # noqa: E402

from shardes import launch  # noqa: E402
from shardes.config import ConfigError, RunError  # noqa: E402
from shardes.generation import encode  # noqa: E402
from shardes.judging import interval, proportion_interval  # noqa: E402
from shardes.launch import Parser, Plan  # noqa: E402
from shardes.likelihood import k3  # noqa: E402
from shardes.population import Exchange, mean  # noqa: E402
from shardes.scoring import Scorer  # noqa: E402
from shardes.stop import StopWatch  # noqa: E402
from shardes.weights import WeightFiles, load, model_directory  # noqa: E402
from shardes.world import Job  # noqa: E402

EXAMPLES = """examples:
  shardes evaluate configs/quickstart.yaml --model exported
  shardes evaluate configs/quickstart.yaml --model exported --gpus 2 --split train test --samples 4 --out both.json
  deepspeed --num_gpus 2 launchers/evaluate.py configs/quickstart.yaml --model exported
"""
PIECE = 64  # prompts that a replica claims at a time


@dataclass
class Evaluation(Plan):
    """`encoded` holds each split's prompts as token ids. `base` is None where there is nothing to compare with."""

    encoded: dict[str, list[list[int]]]
    samples: int
    base: WeightFiles | None
    out: Path


@dataclass
class Piece:
    """A part of the work: the `sample`-th responses (0: the greedy ones) to some prompts of a split."""

    split: str
    sample: int
    rows: range


def parser() -> Parser:
    parser = Parser("evaluate", "[--gpus N] --model DIR [options]", __doc__.splitlines()[0], EXAMPLES)
    parser.add_argument("--model", metavar="DIR", help="the model to judge; default: model.path itself")
    parser.add_argument(
        "--split",
        nargs="+",
        default=["test"],
        help="the task's prompts: train, test, names of task.tests; default: test",
    )
    parser.add_argument("--samples", type=int, default=0, help="sampled responses per prompt; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("evaluation.json"), help="default: %(default)s")
    return parser


def prepare(argv: list[str], job: Job) -> Evaluation:
    arguments, config = parser().read(argv)
    if arguments.samples < 0:
        raise ConfigError(f"--samples {arguments.samples}: must not be negative")
    base = config.model.path
    config.model.path = arguments.model or base
    plan = launch.check(config, job)
    origin = None
    if arguments.model and arguments.samples:
        origin = WeightFiles(model_directory(base))
        origin.stack(plan.module)
        origin.check({name: param.shape for name, param in plan.module.named_parameters()})
    if not arguments.out.parent.is_dir():
        raise ConfigError(f"--out {arguments.out}: there is no directory {arguments.out.parent}")
    encoded = {}
    for split in arguments.split:
        if "=" in split:
            raise ConfigError(f"--split {split}: taken for a split's name; write settings (key=value) before --split")
        try:
            encoded[split] = encode(plan.tokenizer, plan.task.prompts(split))
        except KeyError:
            known = ", ".join(["train", "test", *config.task.tests])
            raise ConfigError(f"--split {split}: the task has no such prompts; there are {known}") from None
    return Evaluation(**vars(plan), encoded=encoded, samples=arguments.samples, base=origin, out=arguments.out)


def work(job: Job, plan: Evaluation, watch: StopWatch) -> None:
    """Answer, score, and compare with the base; rank 0 writes what was found."""
    started = time.monotonic()
    world, engine, responder = launch.build_replica(job, plan)
    load(plan.files, engine.shards)
    watch.wait_for_polls()
    # Of each split all greedy responses, then the first sample of every prompt, and so on.
    pieces = [
        Piece(split, sample, range(begin, min(begin + PIECE, len(prompts))))
        for split, prompts in plan.encoded.items()
        for sample in range(1 + plan.samples)
        for begin in range(0, len(prompts), PIECE)
    ]
    exchange = Exchange(world, "evaluation", len(pieces), plan.config.run.timeout)
    mine: dict[int, dict] = {}
    for number in exchange.claim():
        piece = pieces[number]
        prompts = [plan.encoded[piece.split][row] for row in piece.rows]
        seeds = [_seed(plan.config.es.seed, row, piece.sample) for row in piece.rows] if piece.sample else None
        tokens = responder.respond(prompts, seeds, watch.poll)
        tuned = responder.log_probs(prompts, tokens, watch.poll) if piece.sample and plan.base else []
        mine[number] = dict(tokens=tokens, tuned=tuned)
    if plan.base:
        load(plan.base, engine.shards)
    for number, found in mine.items():
        if found["tuned"]:
            prompts = [plan.encoded[pieces[number].split][row] for row in pieces[number].rows]
            found["base"] = responder.log_probs(prompts, found["tokens"], watch.poll)
        exchange.post(number, json.dumps(found))
    if world.speaks:
        answered = list(map(json.loads, exchange.collect(watch.poll)))
        with closing(Scorer(plan.config.task, plan.task, plan.out.with_suffix(".failed.json"), watch.poll)) as scorer:
            splits = {split: judge(plan, scorer, split, responder.texts, pieces, answered) for split in plan.encoded}
        report = dict(
            model=str(plan.files.directory),
            base=str(plan.base.directory) if plan.base else None,
            seconds=round(time.monotonic() - started, 1),
            splits=splits,
        )
        try:
            plan.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise RunError(f"--out {plan.out}: cannot be written: {error}") from error
        print(summary(splits), f"every response: {plan.out}", sep="\n", flush=True)
    dist.barrier()


def _seed(run_seed: int, prompt: int, sample: int) -> int:
    return int(np.random.SeedSequence([run_seed, prompt, sample]).generate_state(1, np.uint64)[0])


def judge(
    plan: Evaluation,
    scorer: Scorer,
    split: str,
    texts: Callable[[list[list[int]]], list[str]],
    pieces: list[Piece],
    found: list[dict],
) -> dict:
    """A split's report: figures of greedy and sampled responses, and all responses."""
    responses = []
    for sample in range(1 + plan.samples):
        mine = [
            part for piece, part in zip(pieces, found, strict=True) if (piece.split, piece.sample) == (split, sample)
        ]
        tokens = [row for part in mine for row in part["tokens"]]
        apart = [k3(t, b) for part in mine for t, b in zip(part["tuned"], part.get("base", []), strict=True)]
        written = texts(tokens)
        rewards = scorer(split, written)
        right = plan.task.correct(split, written) if hasattr(plan.task, "correct") else None
        for row, text in enumerate(written):
            responses.append(
                dict(prompt=row, sample=sample, reward=rewards[row], tokens=len(tokens[row]), response=text)
                | ({"correct": right[row]} if right else {})
                | ({"kl": apart[row]} if apart else {})
            )
    report = dict(greedy=figures([row for row in responses if row["sample"] == 0]))
    if plan.samples:
        report["sampled"] = figures([row for row in responses if row["sample"]])
    return report | scorer.take_failures() | dict(prompts=plan.task.prompts(split), responses=responses)


def figures(rows: list[dict]) -> dict[str, float | tuple[float, float]]:
    """Means with 95 % intervals: of reward and KL over prompts (each its samples' mean), of accuracy over responses."""
    found: dict[str, float | tuple[float, float]] = {
        "responses": len(rows),
        "tokens": mean([row["tokens"] for row in rows]),
    }
    for key in ("reward", "kl"):
        if key in rows[0]:
            by_prompt: dict[int, list[float]] = {}
            for row in rows:
                by_prompt.setdefault(row["prompt"], []).append(row[key])
            means = [mean(values) for values in by_prompt.values()]
            found |= {key: mean(means), f"{key}_interval": interval(means)}
    if "correct" in rows[0]:
        right = sum(row["correct"] for row in rows)
        found |= {"accuracy": right / len(rows), "accuracy_interval": proportion_interval(right, len(rows))}
    return found


def summary(splits: dict[str, dict]) -> str:
    """The figures, a line each for the greedy and the sampled responses of a split."""
    lines = []
    for split, report in splits.items():
        for kind in ("greedy", "sampled"):
            found = report.get(kind, {})
            parts = [
                f"{key} {found[key]:.4g} [{found[key + '_interval'][0]:.4g}, {found[key + '_interval'][1]:.4g}]"
                for key in ("reward", "accuracy", "kl")
                if key in found
            ]
            if parts:
                lines.append(f"{split}, {kind}: {', '.join(parts)} ({found['responses']} responses)")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    return launch.launch(argv, parser(), prepare, work)


if __name__ == "__main__":
    environment.run(main)
