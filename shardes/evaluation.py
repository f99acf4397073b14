"""A job that evaluates a model: its answers to the task's prompts, beside those of its base.

Every prompt gets the greedy response, and responses sampled at temperature 1, each a function of
es.seed, prompt and sample number. On the sampled responses the tuned model is compared with the
base: KL by the k3 estimator (the paper's equation 1), in nats per token.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from shardes import launch
from shardes.config.schema import Config
from shardes.distributed.signals import ShutdownWatcher
from shardes.distributed.world import Job
from shardes.engines import Engine
from shardes.errors import ConfigError, Stopped, mistakes_in
from shardes.inference.log_probs import k3
from shardes.inference.sampler import Sampler, invalid_logits
from shardes.launch import PreparedRun
from shardes.replicas.protocol import RunStore
from shardes.replicas.work_queue import WorkQueue
from shardes.reporting import json_lines
from shardes.reporting.evaluation import (
    KINDS,
    differences,
    figures,
    not_scored,
    print_comparison,
    summary,
)
from shardes.reporting.progress import counting, slow_step
from shardes.reporting.report_file import ReportFile
from shardes.rewards.scoring import Scorer
from shardes.sharding.model_directory import model_directory
from shardes.sharding.weight_files import WeightFiles, load
from shardes.storage.resume import recorded_date
from shardes.tasks import Task, prompts_of

PIECE = 64  # prompts that a replica claims at a time


@dataclass
class PreparedEvaluation(PreparedRun):
    """`prompts` are the token ids of each split's.

    `base` is None if the model is not compared with one. With `side_by_side` the base answers the
    prompts, too.
    """

    prompts: dict[str, list[list[int]]]
    samples: int
    base: WeightFiles | None
    side_by_side: bool
    out: ReportFile


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
    """Responses as token ids; their log-probabilities under the tuned and the base model; the
    base's own responses.
    """

    tokens: list[list[int]]
    tuned: list[list[float]] = field(default_factory=list)
    base: list[list[float]] = field(default_factory=list)
    base_tokens: list[list[int]] = field(default_factory=list)


OnResponse = Callable[[Piece, int, list[int]], None]  # piece, its row, token ids


def ignore_piece(piece: Piece, row: int, response: list[int]) -> None:
    """What is called with responses on ranks other than the primary."""


class ResponseCount:
    """Counts the responses of a replica, and tries out the reward with the first."""

    def __init__(self, scorer: Scorer, sampler: Sampler):
        self._scorer, self._sampler = scorer, sampler
        self.count = 0

    def __call__(self, piece: Piece, row: int, response: list[int]) -> None:
        self.count += 1
        if response and not self._scorer.is_tried:  # an empty one could not be completed
            (text,) = self._sampler.texts([response])
            self._scorer.try_out(piece.split, text, piece.rows[row])


def prepare(
    config: Config,
    job: Job,
    task: Task | None = None,
    *,
    model: str | None = None,
    base: bool = False,
    split: Sequence[str] = ("test",),
    samples: int = 0,
    out: Path | None = None,
) -> PreparedEvaluation:
    """Make the cheap checks.

    Args:
        task: the user's object, in place of the task that the settings name.
        model, base, split, samples: see `shardes evaluate --help`.
        out: the report; see `ReportFile`.

    Raises:
        ConfigError: the evaluation cannot start.
    """
    if samples < 0:
        raise ConfigError(f"--samples {samples}: must not be negative")
    base_path = config.model.path
    config.es.members_per_batch = 1  # there are no members, and so nothing is to be built for them
    if base and model is None:
        raise ConfigError(f"--base: compares model.path={base_path} with --model DIR; give that")
    if model:
        config.model.path = str(model_directory(model, "--model "))
    prepared = launch.check(config, job, task)
    base_files = None
    if model and (samples or base):
        with mistakes_in(f"model.path={base_path}"):
            base_files = WeightFiles(model_directory(base_path))
            base_files.map_names(prepared.module)
            base_files.check({name: p.shape for name, p in prepared.module.named_parameters()})
    file = ReportFile(out)
    date = launch.shared_date(job, lambda: recorded_date(config))
    prompts = {name: _encode_split(prepared, name, date) for name in split}
    return PreparedEvaluation(
        **vars(prepared),
        prompts=prompts,
        samples=samples,
        base=base_files,
        side_by_side=base,
        out=file,
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
    """Evaluate; a stop leaves no report."""
    try:
        evaluate(job, prepared, watcher)
    except Stopped as stopped:
        print("stopped as asked; no report was written", flush=True)
        stopped.said = True
        raise


def evaluate(job: Job, prepared: PreparedEvaluation, watcher: ShutdownWatcher) -> None:
    """Generate, score, and compare with the base model; the primary rank writes the report."""
    started = time.monotonic()
    store = RunStore.of_job(job)  # before weights are read: ranks may take different times
    world, engine, sampler = launch.build_replica(job, prepared)
    load(prepared.files, engine.shards)
    watcher.expect_polls()
    pieces = _pieces(prepared)
    queue = WorkQueue(
        world,
        store.queue("evaluation"),
        "evaluation",
        len(pieces),
        prepared.config.run.timeout,
        poll=watcher.poll,
    )
    if not world.is_primary:
        _answer(prepared, engine, sampler, pieces, queue, ignore_piece, watcher.poll)
    else:
        scorer = Scorer(
            prepared.config.task,
            prepared.task,
            prepared.out.failed,
            lambda: queue.poll(),  # that of the context below, while it lasts
            watcher.users_code,
        )
        with closing(scorer):
            ended = ResponseCount(scorer, sampler)
            what = "responses" if world.replicas == 1 else "responses of replica 0"
            total = sum(len(piece.rows) for piece in pieces) * (1 + prepared.side_by_side)
            with counting(what, total, lambda: ended.count, watcher.poll) as queue.poll:
                _answer(prepared, engine, sampler, pieces, queue, ended, queue.poll)
                results = [PieceResult(**json.loads(text)) for text in queue.collect()]
            queue.poll = watcher.poll
            with slow_step("scoring the responses"):
                splits = {
                    split: _split_report(prepared, scorer, split, sampler, pieces, results)
                    for split in prepared.prompts
                }
        write(prepared, splits, time.monotonic() - started)
        if prepared.side_by_side:
            print_comparison(splits)
        else:
            print(summary(splits), flush=True)
        if lines := not_scored(splits, prepared.out.failed):
            print(lines, flush=True)
    dist.barrier()


def _pieces(prepared: PreparedEvaluation) -> list[Piece]:
    """All greedy responses of a split, then the first sample of every prompt, and so on."""
    return [
        Piece(split, sample, range(begin, min(begin + PIECE, len(prompts))))
        for split, prompts in prepared.prompts.items()
        for sample in range(1 + prepared.samples)
        for begin in range(0, len(prompts), PIECE)
    ]


def _answer(
    prepared: PreparedEvaluation,
    engine: Engine,
    sampler: Sampler,
    pieces: Sequence[Piece],
    queue: WorkQueue,
    ended: OnResponse,
    poll: Callable[[], None],
) -> None:
    """Answer this replica's pieces with the model, then with the base if they are compared.

    Args:
        ended: is called with each response when it ends.
    """
    results = {}
    for number in queue.claims():
        piece = pieces[number]
        tokens = _generate(prepared, piece, sampler, ended, poll)
        results[number] = result = PieceResult(tokens)
        if piece.sample and prepared.base:
            prompts = _piece_prompts(prepared, piece)
            result.tuned = sampler.log_probs(prompts, result.tokens, poll)
    if prepared.base:
        load(prepared.base, engine.shards)
        prepared.base.load_buffers(prepared.module)
    for number, result in results.items():
        piece = pieces[number]
        if result.tuned:
            prompts = _piece_prompts(prepared, piece)
            result.base = sampler.log_probs(prompts, result.tokens, poll)
        if prepared.side_by_side:
            result.base_tokens = _generate(prepared, piece, sampler, ended, poll)
        queue.post(number, json.dumps(asdict(result)))


def _piece_prompts(prepared: PreparedEvaluation, piece: Piece) -> list[list[int]]:
    return [prepared.prompts[piece.split][row] for row in piece.rows]


def _generate(
    prepared: PreparedEvaluation,
    piece: Piece,
    sampler: Sampler,
    ended: OnResponse,
    poll: Callable[[], None],
) -> list[list[int]]:
    """The responses of a piece, as token ids."""
    seeds = None
    if piece.sample:
        seeds = [_seed(prepared.config.es.seed, row, piece.sample) for row in piece.rows]
    prompts = _piece_prompts(prepared, piece)
    return sampler.generate(prompts, seeds, poll, ended=partial(ended, piece))


def _seed(run_seed: int, prompt: int, sample: int) -> int:
    return int(np.random.SeedSequence([run_seed, prompt, sample]).generate_state(1, np.uint64)[0])


def _split_report(
    prepared: PreparedEvaluation,
    scorer: Scorer,
    split: str,
    sampler: Sampler,
    pieces: Sequence[Piece],
    results: Sequence[PieceResult],
) -> dict[str, Any]:
    """A split's report: figures of greedy and sampled responses, and all responses."""
    tuned: dict[int, list[list[int]]] = {}  # responses by sample
    base: dict[int, list[list[int]]] = {}
    divergences: dict[int, list[float | None]] = {}
    for piece, result in zip(pieces, results, strict=True):
        if piece.split == split:
            tuned.setdefault(piece.sample, []).extend(result.tokens)
            base.setdefault(piece.sample, []).extend(result.base_tokens)
            divergences.setdefault(piece.sample, []).extend(
                k3(mine, theirs) if mine else None  # a response that is not complete has none
                for mine, theirs in zip(result.tuned, result.base, strict=True)
            )
    score = partial(_scored, prepared, scorer, split, sampler)
    rows = score(prepared.files.directory, tuned, divergences)
    report = _figures(rows) | scorer.take_failures()
    if prepared.side_by_side:
        assert prepared.base
        base_rows = score(prepared.base.directory, base, {})
        report["base"] = _figures(base_rows) | scorer.take_failures() | dict(responses=base_rows)
        report["difference"] = {
            kind: differences(_of_kind(rows, kind), _of_kind(base_rows, kind))
            for kind in KINDS
            if kind in report
        }
    return report | dict(prompts=prompts_of(prepared.task, split), responses=rows)


def _figures(rows: list[dict]) -> dict[str, Any]:
    return {kind: figures(found) for kind in KINDS if (found := _of_kind(rows, kind))}


def _of_kind(rows: list[dict], kind: str) -> list[dict]:
    return [row for row in rows if (row["sample"] > 0) == (kind == "sampled")]


def _scored(
    prepared: PreparedEvaluation,
    scorer: Scorer,
    split: str,
    sampler: Sampler,
    model: Path,
    responses: dict[int, list[list[int]]],
    divergences: dict[int, list[float | None]],
) -> list[dict]:
    """A model's responses to a split's prompts, with their rewards, by sample and prompt.

    Args:
        responses: token ids, by sample number.
        divergences: from the base, likewise; empty for those that have none.
    """
    rows = []
    for sample, tokens in sorted(responses.items()):
        texts = sampler.texts(tokens)
        failures = invalid_logits(tokens, str(model), prepared.config.model.dtype)
        rewards = scorer(split, texts, failures=failures)
        correct = scorer.correct(split, texts)
        kl = divergences.get(sample)
        for row, text in enumerate(texts):
            rows.append(
                dict(
                    prompt=row,
                    sample=sample,
                    reward=rewards[row],
                    tokens=len(tokens[row]),
                    response=text,
                )
                | ({"correct": correct[row]} if correct else {})
                | ({"kl": kl[row]} if kl and tokens[row] else {})
            )
    return rows


def write(prepared: PreparedEvaluation, splits: dict[str, dict], seconds: float) -> None:
    """Write the report, of the splits' reports.

    Raises:
        RunError: it cannot be written.
    """
    report = dict(
        model=str(prepared.files.directory),
        base=str(prepared.base.directory) if prepared.base else None,
        seconds=round(seconds, 1),
        splits=splits,
    )
    prepared.out.write(json_lines.to_json(report, indent=1) + "\n")
