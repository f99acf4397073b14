"""Evaluate a model on a task's prompts: rewards, accuracy, and divergence from its base model.

    shardes evaluate CONFIG.yaml --gpus 2 --model DIR [--split test ...] [--samples 4] [--out FILE]
    deepspeed --num_gpus 2 launchers/evaluate.py CONFIG.yaml --model DIR [options]

CONFIG.yaml is the training run's; its model.path is the base model. DIR is the tuned model: a
snapshot or an export. Every prompt gets the greedy response and, with --samples n, n responses
sampled at temperature 1, each a function of es.seed, prompt and sample number. On the sampled
responses the tuned model is compared with the base: KL by the k3 estimator (the paper's equation
1), in nats per token. FILE (default: evaluation.json in the working directory) holds the figures
with 95 % confidence intervals, and every response.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import datetime
from os.path import expanduser
from pathlib import Path

import numpy as np

from shardes.distributed import environment

with environment.quiet():
    import deepspeed  # noqa: F401

import torch.distributed as dist

from shardes import launch, lifecycle
from shardes.commands.arguments import LaunchParser, path
from shardes.distributed.signals import ShutdownWatcher
from shardes.distributed.world import Job
from shardes.errors import ConfigError, RunError, mistakes_in
from shardes.es.statistics import interval, mean, proportion_interval
from shardes.inference.log_probs import k3
from shardes.inference.sampler import Sampler, invalid_logits
from shardes.launch import PreparedRun
from shardes.replicas.protocol import RunStore
from shardes.replicas.work_queue import WorkQueue
from shardes.reporting import json_lines
from shardes.rewards.scoring import Scorer
from shardes.sharding.model_directory import model_directory
from shardes.sharding.weight_files import WeightFiles, load
from shardes.storage.resume import recorded_date
from shardes.tasks import prompts_of

EXAMPLES = """examples:
  shardes evaluate configs/quickstart.yaml --model exported
  shardes evaluate configs/quickstart.yaml --model exported --gpus 2 --split train test --samples 4
  deepspeed --num_gpus 2 launchers/evaluate.py configs/quickstart.yaml --model exported
"""
PIECE = 64  # prompts that a replica claims at a time


@dataclass
class PreparedEvaluation(PreparedRun):
    """`prompts` are the token ids of each split's.

    `base` is None if the model is not compared with one.
    """

    prompts: dict[str, list[list[int]]]
    samples: int
    base: WeightFiles | None
    out: Path


@dataclass(frozen=True)
class Piece:
    """A part of the work: sample number `sample` (0: the greedy response) of some prompts of a
    split.
    """

    split: str
    sample: int
    rows: range


@dataclass
class PieceResult:
    """Responses as token ids; their log-probabilities under the tuned and the base model."""

    tokens: list[list[int]]
    tuned: list[list[float]] = field(default_factory=list)
    base: list[list[float]] = field(default_factory=list)


def parser() -> LaunchParser:
    summary = __doc__.splitlines()[0]
    parser = LaunchParser("evaluate", "[--gpus N] [--model DIR] [options]", summary, EXAMPLES)
    add = parser.add_argument
    help = "the model to evaluate; default: model.path itself"
    add("--model", metavar="DIR", type=expanduser, help=help)
    add(
        "--split",
        nargs="+",
        default=["test"],
        help="the task's prompts: train, test, names of task.tests; default: test",
    )
    add("--samples", type=int, default=0, help="sampled responses per prompt; default: %(default)s")
    add("--out", type=path, default=Path("evaluation.json"), help="default: %(default)s")
    return parser


def prepare(argv: list[str], job: Job) -> PreparedEvaluation:
    arguments, config = parser().read(argv)
    if arguments.samples < 0:
        raise ConfigError(f"--samples {arguments.samples}: must not be negative")
    base_path = config.model.path
    config.model.path = arguments.model or base_path
    prepared = launch.check(config, job)
    base = None
    if arguments.model and arguments.samples:
        with mistakes_in(f"model.path={base_path}"):
            base = WeightFiles(model_directory(base_path))
            base.map_names(prepared.module)
            base.check({name: param.shape for name, param in prepared.module.named_parameters()})
    if not arguments.out.parent.is_dir():
        raise ConfigError(f"--out {arguments.out}: there is no directory {arguments.out.parent}")
    date = launch.shared_date(job, lambda: recorded_date(config))
    prompts = {split: _encode_split(prepared, split, date) for split in arguments.split}
    return PreparedEvaluation(
        **vars(prepared), prompts=prompts, samples=arguments.samples, base=base, out=arguments.out
    )


def _encode_split(prepared: PreparedRun, split: str, date: datetime) -> list[list[int]]:
    if "=" in split:
        raise ConfigError(
            f"--split {split}: taken for a split's name; write settings (key=value) before --split"
        )
    try:
        return launch.encode_split(prepared, split, date)
    except ConfigError as error:
        if not isinstance(error.__cause__, KeyError):
            raise
        known = ", ".join(["train", "test", *prepared.config.task.tests])
        raise ConfigError(
            f"--split {split}: the task has no such prompts; there are {known}"
        ) from None


def work(job: Job, prepared: PreparedEvaluation, watcher: ShutdownWatcher) -> None:
    """Generate, score, and compare with the base model; the primary rank writes the report."""
    started = time.monotonic()
    store = RunStore.of_job(job)  # before weights are read: ranks may take different times
    world, engine, sampler = launch.build_replica(job, prepared)
    load(prepared.files, engine.shards)
    watcher.expect_polls()
    # First all greedy responses of a split, then the first sample of every prompt, and so on.
    pieces = [
        Piece(split, sample, range(begin, min(begin + PIECE, len(prompts))))
        for split, prompts in prepared.prompts.items()
        for sample in range(1 + prepared.samples)
        for begin in range(0, len(prompts), PIECE)
    ]
    queue = WorkQueue(
        world,
        store.queue("evaluation"),
        "evaluation",
        len(pieces),
        prepared.config.run.timeout,
        poll=watcher.poll,
    )
    results = {
        number: _generate(prepared, pieces[number], sampler, watcher.poll)
        for number in queue.claims()
    }
    if prepared.base:
        load(prepared.base, engine.shards)
        prepared.base.load_buffers(prepared.module)
    for number, result in results.items():
        if result.tuned:
            prompts = _piece_prompts(prepared, pieces[number])
            result.base = sampler.log_probs(prompts, result.tokens, watcher.poll)
        queue.post(number, json.dumps(asdict(result)))
    if world.is_primary:
        texts = queue.collect()
        all_results = [PieceResult(**json.loads(text)) for text in texts]
        failed = prepared.out.with_suffix(".failed.json")
        scorer = Scorer(
            prepared.config.task, prepared.task, failed, watcher.poll, watcher.users_code
        )
        with closing(scorer):
            splits = {
                split: _split_report(prepared, scorer, split, sampler, pieces, all_results)
                for split in prepared.prompts
            }
        _write(prepared, splits, time.monotonic() - started)
        print(summary(splits), f"every response: {prepared.out}", sep="\n", flush=True)
    dist.barrier()


def _piece_prompts(prepared: PreparedEvaluation, piece: Piece) -> list[list[int]]:
    return [prepared.prompts[piece.split][row] for row in piece.rows]


def _generate(
    prepared: PreparedEvaluation, piece: Piece, sampler: Sampler, poll: Callable[[], None]
) -> PieceResult:
    """The responses of a piece, and of sampled ones the tuned model's log-probabilities."""
    prompts, seeds = _piece_prompts(prepared, piece), None
    if piece.sample:
        seeds = [_seed(prepared.config.es.seed, row, piece.sample) for row in piece.rows]
    result = PieceResult(sampler.generate(prompts, seeds, poll))
    if piece.sample and prepared.base:
        result.tuned = sampler.log_probs(prompts, result.tokens, poll)
    return result


def _seed(run_seed: int, prompt: int, sample: int) -> int:
    return int(np.random.SeedSequence([run_seed, prompt, sample]).generate_state(1, np.uint64)[0])


def _split_report(
    prepared: PreparedEvaluation,
    scorer: Scorer,
    split: str,
    sampler: Sampler,
    pieces: Sequence[Piece],
    results: Sequence[PieceResult],
) -> dict:
    """A split's report: figures of greedy and sampled responses, and all responses."""
    task = prepared.task
    responses = []
    for sample in range(1 + prepared.samples):
        parts = [
            result
            for piece, result in zip(pieces, results, strict=True)
            if (piece.split, piece.sample) == (split, sample)
        ]
        tokens = [row for part in parts for row in part.tokens]
        divergences = [
            k3(tuned, base) if tuned else None  # a response that is not complete has none
            for part in parts
            for tuned, base in zip(part.tuned, part.base, strict=True)
        ]
        texts = sampler.texts(tokens)
        config = prepared.config
        failures = invalid_logits(tokens, config.model.path, config.model.dtype)
        rewards = scorer(split, texts, failures=failures)
        correct = scorer.correct(split, texts)
        for row, text in enumerate(texts):
            responses.append(
                dict(
                    prompt=row,
                    sample=sample,
                    reward=rewards[row],
                    tokens=len(tokens[row]),
                    response=text,
                )
                | ({"correct": correct[row]} if correct else {})
                | ({"kl": divergences[row]} if divergences and tokens[row] else {})
            )
    report = dict(greedy=figures([row for row in responses if row["sample"] == 0]))
    if prepared.samples:
        report["sampled"] = figures([row for row in responses if row["sample"]])
    return (
        report | scorer.take_failures() | dict(prompts=prompts_of(task, split), responses=responses)
    )


def _write(prepared: PreparedEvaluation, splits: dict[str, dict], seconds: float) -> None:
    report = dict(
        model=str(prepared.files.directory),
        base=str(prepared.base.directory) if prepared.base else None,
        seconds=round(seconds, 1),
        splits=splits,
    )
    text = json_lines.to_json(report, indent=1) + "\n"
    try:
        prepared.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"--out {prepared.out}: cannot be written: {error}") from error


def figures(rows: list[dict]) -> dict[str, float | tuple[float, float]]:
    """Means with 95 % confidence intervals.

    Reward and KL are averaged over prompts, each prompt by its samples' mean; accuracy over
    responses.
    """
    report: dict[str, float | tuple[float, float]] = {
        "responses": len(rows),
        "tokens": mean([row["tokens"] for row in rows]),
    }
    for key in ("reward", "kl"):
        if any(key in row for row in rows):
            by_prompt: dict[int, list[float]] = {}
            for row in rows:
                if key in row:
                    by_prompt.setdefault(row["prompt"], []).append(row[key])
            means = [mean(values) for values in by_prompt.values()]
            report |= {key: mean(means), f"{key}_interval": interval(means)}
    if "correct" in rows[0]:
        correct = sum(row["correct"] for row in rows)
        report |= {
            "accuracy": correct / len(rows),
            "accuracy_interval": proportion_interval(correct, len(rows)),
        }
    return report


def summary(splits: dict[str, dict]) -> str:
    """A line of figures each for the greedy and the sampled responses of a split."""
    lines = []
    for split, report in splits.items():
        for kind in ("greedy", "sampled"):
            values = report.get(kind, {})
            parts = [
                f"{key} {values[key]:.4g} "
                f"[{values[f'{key}_interval'][0]:.4g}, {values[f'{key}_interval'][1]:.4g}]"
                for key in ("reward", "accuracy", "kl")
                if key in values
            ]
            if parts:
                count = values["responses"]
                lines.append(f"{split}, {kind}: {', '.join(parts)} ({count} responses)")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    return lifecycle.launch(argv, parser(), prepare, work)


if __name__ == "__main__":
    environment.run(main)
