"""The loop: Algorithm 2 of the paper, on one rank.

Every rank of every replica runs this code. Ranks differ only in the coordinator, reporter,
evaluator and snapshot writer that they are given: see `shardes/roles.py`.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch.profiler import profile

from shardes.answers import Answers
from shardes.clock import Clock
from shardes.config.schema import Config, Restore
from shardes.distributed.world import World
from shardes.es.center import Center
from shardes.es.population import Iteration, select
from shardes.es.statistics import mean, std
from shardes.evaluator import Evaluator
from shardes.inference.sampler import Sampler, invalid_logits
from shardes.replicas.consistency import ConsistencyCheck, check_digest
from shardes.replicas.coordinator import Coordinator
from shardes.replicas.member_queue import IterationResults, MemberQueue
from shardes.replicas.protocol import MemberResult
from shardes.reporting.reporter import Reporter, peak_resident_bytes
from shardes.rewards.scoring import FAILURES, Scorer
from shardes.storage.journal import Record
from shardes.storage.resume import ResumePoint
from shardes.storage.snapshots import Snapshots
from shardes.tasks import Task, prompts_of

# Parts of an iteration's seconds, as the clock names them.
PARTS = ("perturb", "gather", "generate", "restore", "update", "exchange")


class Trainer:
    """One rank of a run.

    Args:
        center: loaded from the snapshot `resume.source`, or from the base model.
        prompts: the token ids of each split's prompts.
        clock: the one that center, sampler and coordinator use.
        poll: raises Stopped when the run is to stop.
        trace: where to write a torch.profiler trace of the second iteration.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        task: Task,
        prompts: dict[str, list[list[int]]],
        center: Center,
        sampler: Sampler,
        answers: Answers,
        scorer: Scorer,
        evaluator: Evaluator,
        coordinator: Coordinator,
        consistency: ConsistencyCheck,
        snapshots: Snapshots,
        reporter: Reporter,
        resume: ResumePoint,
        clock: Clock,
        poll: Callable[[], None],
        trace: Path | None = None,
    ):
        self.config, self.world, self.task, self.prompts = config, world, task, prompts
        self.center, self.sampler, self.answers = center, sampler, answers
        self.scorer, self.evaluator = scorer, evaluator
        self.coordinator, self.consistency, self.snapshots = coordinator, consistency, snapshots
        self.reporter, self.resume, self.clock, self.poll = reporter, resume, clock, poll
        self.trace = trace
        own = resume.source is not None and (
            Path(resume.source).parent.parent.resolve() == Path(config.run.dir).resolve()
        )
        self.saved = resume.source_iteration if own else -1  # as a snapshot of this run
        self.digest = ""  # of the center
        self.members_evaluated = 0  # by this replica
        self.reward_means = list(resume.reward_means)
        self.started = 0.0  # by the monotonic clock

    def train(self) -> None:
        """Algorithm 2, from the journal's end to the last iteration.

        Raises:
            Stopped: the run was asked to stop.
        """
        self.started = time.monotonic()
        self.replay_journal()
        for t in range(self.resume.iteration, self.config.es.iterations):
            iteration = self.iteration(t)
            self.before_iteration(iteration)
            with self.profiled(t):
                self.train_iteration(iteration)
        self.finish()

    def train_iteration(self, iteration: Iteration) -> None:
        """Evaluate the population, journal it, update the center."""
        started = time.perf_counter()
        self.clock.take()  # what came before is not this iteration's
        results = self.evaluate_members(iteration)  # R_1 … R_N, collected on the primary rank
        self.evaluator.complete()  # until all replicas have answered with this center
        # z_n and c_n = (α/N)·z_n (es/fitness.py), in the journal before they are published.
        record = self.coordinator.commit(iteration, results)
        self.reporter.check_learning(record)
        with self.clock("exchange"):
            self.snapshots.wait_written()  # until this rank's part of this center is copied
        with self.clock("update"):
            update_metrics = self.center.update(record.update)  # θ ← θ + Σ c_n·ε(s_n)
        seconds = time.perf_counter() - started
        self.digest = self.center.digest()
        self.reward_means.append(mean(record.rewards))
        metrics = iteration_metrics(record, results, seconds, self.clock.take()) | update_metrics
        self.reporter.log_iteration(metrics | self.evaluator.finish(record.iteration))

    def evaluate_members(self, iteration: Iteration) -> IterationResults:
        """Evaluate members for this replica until every member has a reward."""
        queue = self.coordinator.member_queue(iteration, self.answers.group_size(iteration))
        scored: Callable[[], None] = nothing
        for group in queue:  # this replica's claims, then the members of replicas that died
            answered = self.evaluate_group(iteration, group, queue) if group else nothing
            scored()  # workers scored the group before while this one answered
            scored = answered
            if not self.scorer.in_workers:
                scored()
                scored = nothing
        return queue.results()

    def evaluate_group(
        self, iteration: Iteration, group: Sequence[int], queue: MemberQueue
    ) -> Callable[[], None]:
        """Let members answer, and score each from when its last response ends; returns a function
        that posts their rewards.
        """
        posts: dict[int, Callable[[], None]] = {}

        def finished(number: int, responses: list[list[int]]) -> None:
            if self.world.is_leader:
                posts[number] = self.score_member(iteration, number, responses, queue)

        self.answers.generate(iteration, group, queue.poll, finished)  # with θ + σ·ε(s_n)

        def post() -> None:
            for number in group:
                self.world.run_on_leader(lambda: posts[number]())  # noqa: B023  # called at once
                self.members_evaluated += 1

        return post

    def score_member(
        self, iteration: Iteration, number: int, responses: list[list[int]], queue: MemberQueue
    ) -> Callable[[], None]:
        """Start to score a member's responses, given as token ids; returns a function that posts
        its reward, their mean.
        """
        texts = self.sampler.texts(responses)
        model = (
            f"member {number} of iteration {iteration.index} "
            f"(seed {iteration.members[number].seed})"
        )
        failures = invalid_logits(responses, model, self.config.model.dtype)
        scores = self.scorer.start("train", texts, iteration.prompt_numbers, failures)

        def post() -> None:
            rewards = scores()
            result = MemberResult(
                reward=mean(rewards),
                tokens=sum(map(len, responses)),
                replica=self.world.replica,
                finished=time.time(),
                scores=rewards if self.config.es.standardize_prompts else [],
                failures=self.scorer.take_failures(),
                parts=self.scorer.parts,
            )
            prompts = select(prompts_of(self.task, "train"), iteration.prompt_numbers)
            self.reporter.responses(number, prompts, texts, rewards)
            self.reporter.answered(texts, self.sampler.answer_kinds(responses, texts))
            with self.clock("exchange"):
                queue.post(number, result)

        return post

    def before_iteration(self, iteration: Iteration) -> None:
        """Compare, evaluate and save the center before members are made of it.

        Nothing here moves θ.
        """
        t = iteration.index
        self.consistency.check(t, self.digest)
        if self.evaluator.due(t):
            self.evaluator.start(iteration)
        if self.snapshots.due(t):
            self.save_snapshot(t)
        self.keep_if_best(t)

    def keep_if_best(self, t: int) -> None:
        """Keep a snapshot of the center before iteration t if no center was better so far."""
        if self.evaluator.is_best(t):
            self.save_snapshot(t)
            self.snapshots.keep_best(t)

    def finish(self) -> None:
        """Save and evaluate the final center."""
        iterations = self.config.es.iterations
        self.coordinator.finish(iterations, self.digest)
        if self.config.checkpoint.every:
            self.save_snapshot(iterations)
        if iterations not in self.evaluator.evaluations:
            self.evaluator.start(self.iteration(iterations))  # an iteration without members
        self.evaluator.complete()
        self.keep_if_best(iterations)
        self.evaluator.finish(iterations)
        self.snapshots.finish()
        seconds = time.monotonic() - self.started
        self.reporter.summary(self.reward_means, self.evaluator.evaluations, self.digest, seconds)

    def iteration(self, t: int) -> Iteration:
        return Iteration.derive(self.config, t, self.digest, self.prompts["train"])

    def replay_journal(self) -> None:
        """Rebuild the center from the source and the journal's records since.

        Raises:
            RunError: its digest is not the journal's.
        """
        resume = self.resume
        # With es.restore=subtract members leave rounding errors behind, which no replay repeats.
        exact = self.config.es.restore is Restore.copy
        self.digest = self.center.digest()
        if resume.source:
            check_digest(f"the center of {resume.source}", self.digest, resume.digest)
        for record in resume.records:
            if exact:
                check_digest(
                    f"the center before iteration {record.iteration}", self.digest, record.digest
                )
            self.poll()
            self.replay(record)
        if exact:
            check_digest(
                f"the center before iteration {resume.iteration}", self.digest, resume.target
            )
        evaluated = resume.iteration in self.evaluator.evaluations
        self.coordinator.start(resume.iteration, self.digest, evaluated)

    def replay(self, record: Record) -> None:
        """Update the center by a record of the journal, and do what a stop kept from being done:
        the newest iteration's evaluation and metrics, and a snapshot of the best center.
        """
        t = record.iteration
        newest = t + 1 == self.resume.iteration
        if newest and self.evaluator.due(t):
            self.evaluator.start(self.iteration(t))
            self.evaluator.complete()
        self.keep_if_best(t)
        self.snapshots.wait_written()
        metrics = record_metrics(record) | self.center.update(record.update)
        self.digest = self.center.digest()
        if newest:
            self.reporter.repair_iteration(metrics | self.evaluator.finish(t))

    def save_snapshot(self, t: int) -> None:
        """Start to save the center before iteration t, unless that was done or it was read from
        there.
        """
        if t == self.saved:
            return
        self.saved = t
        self.snapshots.begin(t, self.digest)
        if self.config.es.restore is Restore.subtract:
            self.snapshots.wait_written()  # the live weights are about to be perturbed

    def profiled(self, t: int) -> AbstractContextManager:
        """A context that writes a trace of the second iteration, or of the only one."""
        if self.trace is None or t != min(1, self.config.es.iterations - 1):
            return nullcontext()
        file = str(self.trace)
        return profile(on_trace_ready=lambda trace: trace.export_chrome_trace(file))


def iteration_metrics(
    record: Record, results: IterationResults, seconds: float, clock: dict[str, float]
) -> dict[str, float]:
    """An iteration's row of metrics.jsonl, as the primary rank sees it."""
    return record_metrics(record) | {
        "seconds": seconds,
        **{f"seconds_{part}": clock[part] for part in PARTS},
        "seconds_idle": results.idle_seconds,
        "exchanged_bytes": results.exchanged_bytes,
        "peak_resident_bytes": peak_resident_bytes(),
    }


def record_metrics(record: Record) -> dict[str, float]:
    """What the journal knows of an iteration's row of metrics.jsonl."""
    return {
        "iteration": record.iteration,
        "reward_mean": mean(record.rewards),
        "reward_std": std(record.rewards),
        "reward_min": min(record.rewards),
        "reward_max": max(record.rewards),
        "generated_tokens": record.tokens,
        **{name: record.failures.get(name, 0) for name in FAILURES},
        **{f"reward/{name}": value for name, value in record.parts.items()},
    }


def nothing() -> None:
    """Do nothing."""
