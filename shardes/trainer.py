"""The loop: Algorithm 2 of the paper."""

import json
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch.profiler import profile

from shardes.agreement import check_replicas
from shardes.attempts import record_failure
from shardes.center import Center, member
from shardes.config import Config, Restore, RunError
from shardes.journal import Finish, Journal, Record, Reward
from shardes.meeting import Meeting
from shardes.metrics import Clock, Reporter, peak_resident_bytes
from shardes.population import Evaluation, Exchange, Population, idle_seconds, mean, std
from shardes.responses import Responder
from shardes.resume import Start
from shardes.scoring import Scorer
from shardes.snapshots import Snapshots
from shardes.stop import Stopped, StopWatch
from shardes.tasks import Split, Task
from shardes.variants import chosen, coefficients, fitness, noise_seeds, perturbation, prompt_batch, scheduled
from shardes.weights import WeightFiles
from shardes.world import World

SPLITS: dict[Split, str] = {"train": "center_reward", "test": "held_out_reward"}  # and their metrics' names


@dataclass
class Examination:
    """An evaluation of the center: prompts shared out between replicas, responses not yet collected."""

    iteration: int
    exchange: Exchange
    work: list[tuple[Split, slice]]
    distance: dict[str, float]
    metrics: dict[str, float] | None = None  # once it has been judged


class Trainer:
    """Everything one rank needs for a run.

    `encoded` holds each split's prompts as token ids. `center` is that of `start.source`. `journal` is there on the
    rank that speaks, which decides what an iteration comes to; the others hear of it at the `meeting`.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        center: Center,
        base: WeightFiles,
        task: Task,
        responder: Responder,
        encoded: dict[str, list[list[int]]],
        watch: StopWatch,
        meeting: Meeting,
        start: Start,
        journal: Journal | None,
    ):
        self.config = config
        self.world = world
        self.center = center
        self.base = base
        self.task = task
        self.responder = responder
        self.encoded = encoded
        self.watch = watch
        self.meeting = meeting
        self.start = start
        self.journal = journal
        self.evaluated = 0  # members, by this replica
        self.reporter: Reporter | None = None
        directory = Path(config.run.dir)
        self.scorer = Scorer(config.task, task, directory / "failed_scoring.json", watch.poll)
        self.snapshots = Snapshots(directory, config.checkpoint, world, center, base, self.say, config.run.timeout)
        if world.speaks:
            self.reporter = Reporter(config, start.means, world.layout)
            if config.es.restore is Restore.subtract and world.replicas > 1:
                self.reporter.say(
                    "warning: es.restore=subtract: each replica's center drifts by itself; only copy is exact"
                )

    def say(self, line: str) -> None:
        if self.reporter:
            self.reporter.say(line)
        elif self.world.joined and self.world.leads:
            print(line, flush=True)

    def run(self) -> None:
        """Train, from where the run stands to the last iteration.

        Raises:
            Stopped: the run was asked to stop.
        """
        try:
            self.train()
        except Stopped as stopped:
            self.say(str(stopped))
            raise
        except Exception as error:
            if not self.world.joined:  # the run's directory is its home's
                record_failure(Path(self.config.run.dir), self.world.job.rank, error)
            raise

    def train(self) -> None:
        started = time.monotonic()
        self.watch.wait_for_polls()
        digest = self.rebuild()
        means, evaluations = list(self.start.means), []
        iterations, every, verify_every = (
            self.config.es.iterations,
            self.config.eval.every,
            self.config.checkpoint.verify_every,
        )
        if self.journal:
            self.meeting.begin(self.start.iteration, digest)
        exact = self.config.es.restore is Restore.copy
        comparable = self.world.replicas > 1 and exact and not self.world.joined
        for iteration in range(self.start.iteration, iterations):
            if comparable and verify_every and iteration % verify_every == 0:
                check_replicas(self.world, self.center, iteration, digest, self.config.run.timeout)
            due = iteration == 0 or (every > 0 and iteration % every == 0)
            examination = self.examine(iteration) if due else None
            best = examination is not None and self.is_best(examination)
            if (best or self.snapshots.due(iteration)) and not self.from_snapshot(iteration):
                self.snapshot(iteration, digest)
            if best:
                self.snapshots.keep_best(iteration)
            with self.profiled(iteration):
                metrics = self.iterate(iteration, digest, examination)
            digest = self.center.digest()
            means.append(metrics["reward_mean"])
            if self.reporter:
                evaluations += [self.judged(examination)] if examination else []
                self.reporter.iteration(metrics | (evaluations[-1] if examination else {}))
        if self.journal:
            self.journal.append(Finish(iterations, digest))
        if self.config.checkpoint.every and not self.from_snapshot(iterations):
            self.snapshot(iterations, digest)
        examination = self.examine(iterations)
        self.complete(examination)
        if self.is_best(examination):
            self.snapshots.keep_best(iterations)
        self.snapshots.finish()
        if self.world.joined:
            self.say(f"done: this replica evaluated {self.evaluated} members; center {digest}")
        if self.reporter:
            evaluations.append(self.judged(examination))
            self.reporter.summary(means, evaluations, digest, time.monotonic() - started)

    def rebuild(self) -> str:
        """Replay what the journal says since the center was saved; returns the center's digest.

        Raises:
            RunError: the center is not the one that the journal speaks of.
        """
        exact = self.config.es.restore is Restore.copy  # else rounding left something behind with every member
        digest = self.center.digest()
        known = [(f"the center of {self.start.source}", self.start.digest)] if self.start.source else []
        for record in self.start.records:
            if exact:
                known.append((f"the center before iteration {record.iteration}", record.digest))
            self._expect(known, digest)
            self.watch.poll()
            self.center.update(record.update)
            digest, known = self.center.digest(), []
        if exact:
            known.append((f"the center before iteration {self.start.iteration}", self.start.target))
        self._expect(known, digest)
        return digest

    def _expect(self, known: list[tuple[str, str | None]], digest: str) -> None:
        for what, expected in known:
            if expected not in (None, digest):
                raise RunError(
                    f"{what} is rebuilt with digest {digest}, where the journal has {expected}; "
                    f"see shardes journal {self.config.run.dir} verify"
                )

    def from_snapshot(self, iteration: int) -> bool:
        """Whether the center before `iteration` is just what this start has read from a snapshot."""
        return iteration == self.start.iteration and self.start.source is not None and not self.start.records

    def snapshot(self, iteration: int, digest: str) -> None:
        """Start writing the center; it may change again after `snapshots.wait_written`."""
        self.snapshots.begin(iteration, digest)
        if self.config.es.restore is Restore.subtract:
            self.snapshots.wait_written()  # the live weights are about to be perturbed

    def iterate(self, iteration: int, digest: str, examination: Examination | None) -> dict[str, float]:
        """One iteration: evaluate the population, journal it, update the center. Returns its metrics.

        `digest` is the center's, which must have answered all of its `examination` before it moves.
        """
        es, clock = self.config.es, Clock()
        self.responder.clock, started = clock, time.perf_counter()
        sigma, _ = scheduled(es, iteration)
        asked = self.batch(iteration)
        prompts, questions = self.prompts("train", asked), chosen(self.task.prompts("train"), asked)
        seeds = noise_seeds(es, iteration)
        members = [perturbation(es, seeds, number, sigma) for number in range(es.population_size)]
        known = self.start.rewards if iteration == self.start.iteration else {}
        width = len(prompts) if es.standardize_prompts else 0
        population = Population(
            self.world, iteration, [seed for seed, _ in members], self.config.run.timeout, known, width
        )
        looked = time.monotonic()

        def record_rewards():
            if self.journal and self.reporter:  # the same rank has both
                for number, reward, tokens, scores in population.new_rewards():
                    self.journal.append(Reward(iteration, number, reward, tokens, digest, scores))
                    self.reporter.member(tokens)

        def poll():
            nonlocal looked
            self.watch.poll()
            if self.reporter and time.monotonic() - looked > 0.5:
                looked = time.monotonic()
                record_rewards()
                self.reporter.members(iteration, population.done())

        def evaluate(number: int):
            with member(self.center, *members[number], clock):
                tokens = self.responder.respond(prompts, poll=poll)
            texts = self.responder.texts(tokens)
            scores = self.world.led(lambda: self.scorer("train", texts, asked), len(prompts))
            self.scorer.post_failures(self.world.store, iteration)
            population.post_reward(number, mean(scores), sum(map(len, tokens)), scores[:width])
            if self.reporter:
                self.reporter.responses(number, questions, texts, scores)
            self.evaluated += 1
            with clock("exchange"):
                record_rewards()

        for number in population.claim():
            evaluate(number)
        with clock("exchange"):
            for number in population.take_over(self.meeting, poll):
                evaluate(number)
            if examination:
                self.complete(examination)
            evaluations = population.evaluations() if self.journal else []
            if self.journal:
                record_rewards()
                record = self.decide(iteration, digest, seeds, asked, evaluations)
                self.journal.append(record)
                self.meeting.publish(record)
            else:
                record = self.meeting.await_record(iteration, poll)
        if self.world.joined:
            self._expect([(f"the center before iteration {iteration}", record.digest)], digest)
        with clock("exchange"):
            self.snapshots.wait_written()
        with clock("update"):
            updated = self.center.update(record.update)

        parts = ("perturb", "gather", "generate", "restore", "update", "exchange")
        return {
            "iteration": iteration,
            "reward_mean": mean(record.rewards),
            "reward_std": std(record.rewards),
            "reward_min": min(record.rewards),
            "reward_max": max(record.rewards),
            "seconds": time.perf_counter() - started,
            **{f"seconds_{part}": clock.seconds[part] for part in parts},
            "seconds_idle": idle_seconds(evaluations) if evaluations else 0.0,
            "exchanged_bytes": population.bytes,
            "peak_resident_bytes": peak_resident_bytes(),
            "generated_tokens": sum(evaluation.tokens for evaluation in evaluations),
            **self.scorer.failures(self.world.store, iteration),
            **updated,
        }

    def decide(
        self, iteration: int, digest: str, seeds: list[int], asked: list[int] | None, evaluations: list[Evaluation]
    ) -> Record:
        """What the members' rewards make of an iteration: which step the center takes."""
        es = self.config.es
        sigma, alpha = scheduled(es, iteration)
        rewards = [evaluation.reward for evaluation in evaluations]
        weights = fitness(es, [evaluation.scores or [evaluation.reward] for evaluation in evaluations])
        record = Record(
            iteration, seeds, rewards, coefficients(es, alpha, weights), sigma, alpha, digest,
            es.weight_decay, es.decay_to.value, es.evolve, asked,
        )  # fmt: skip
        if not any(record.coefficients) and alpha:
            self.say(
                f"warning: iteration {iteration}: all {len(rewards)} rewards are {rewards[0]}, so nothing is learned; "
                "a larger es.sigma or a finer reward would tell the members apart"
            )
        return record

    def examine(self, iteration: int) -> Examination:
        """Let the center answer both splits' prompts, a part per replica; nobody waits for the others' parts."""
        work, prompts = [], {"train": self.prompts("train", self.batch(iteration)), "test": self.encoded["test"]}
        for split in SPLITS:
            parts = min(self.world.replicas, len(prompts[split]))
            work += [(split, slice(part, None, parts)) for part in range(parts)]
        exchange = Exchange(self.world, f"evaluation {iteration}", len(work), self.config.run.timeout)
        examination = Examination(iteration, exchange, work, self.center.distance() if self.world.replica == 0 else {})
        self.answer(examination, exchange.claim())
        return examination

    def complete(self, examination: Examination) -> None:
        """Wait until the center has answered all, and answer what replicas that died have left."""
        self.answer(examination, examination.exchange.take_over(self.meeting, self.watch.poll))

    def answer(self, examination: Examination, numbers: Iterable[int]) -> None:
        """Let the center answer some pieces of an examination."""
        for number in numbers:
            split, where = examination.work[number]
            prompts = self.prompts(split, self.batch(examination.iteration) if split == "train" else None)
            self.center.show()
            tokens = self.responder.respond(prompts[where], poll=self.watch.poll)
            examination.exchange.post(number, json.dumps(tokens))

    def is_best(self, examination: Examination) -> bool:
        """Whether this center has the best held-out reward so far, where that one is kept. For replica 0."""
        if not self.config.checkpoint.best:
            return False
        self.complete(examination)
        if self.world.replica != 0:
            return False
        (reward,) = self.world.led(lambda: [self.judged(examination)["held_out_reward"]], 1)
        (before,) = self.world.led(lambda: [self.reporter.best_held_out] if self.reporter else [], 1)
        if self.reporter:
            self.reporter.best_held_out = max(before, reward)
        return reward > before

    def judged(self, examination: Examination) -> dict[str, float]:
        """What `judge` says, which looks only once."""
        if examination.metrics is None:
            examination.metrics = self.judge(examination)
        return examination.metrics

    def judge(self, examination: Examination) -> dict[str, float]:
        """The center's rewards on both splits and its distance from the base; its responses become samples."""
        found = list(map(json.loads, examination.exchange.collect(self.watch.poll)))
        metrics = {}
        for split, name in SPLITS.items():
            asked = self.batch(examination.iteration) if split == "train" else None
            tokens: list[list[int]] = [[] for _ in self.prompts(split, asked)]
            for (of, where), part in zip(examination.work, found, strict=True):
                if of == split:
                    tokens[where] = part
            texts = self.responder.texts(tokens)
            rewards = self.scorer(split, texts, asked)
            metrics[name] = mean(rewards)
            if split == "test" and hasattr(self.task, "correct"):
                metrics["held_out_accuracy"] = mean(self.task.correct(split, texts))
            assert self.reporter
            self.reporter.samples(examination.iteration, split, chosen(self.task.prompts(split), asked), texts, rewards)
        failed = {f"evaluation_{name}": count for name, count in self.scorer.take_failures().items()}
        return metrics | failed | examination.distance

    def batch(self, iteration: int) -> list[int] | None:
        """The training prompts of an iteration, by number; None: all."""
        size = self.config.task.prompts_per_iteration
        return prompt_batch(self.config.es.seed, iteration, size, len(self.encoded["train"]))

    def prompts(self, split: Split, asked: list[int] | None) -> Sequence[list[int]]:
        """The token ids of the prompts `asked`."""
        return chosen(self.encoded[split], asked)

    def profiled(self, iteration: int) -> AbstractContextManager:
        """A context that writes a torch.profiler trace of the second iteration (the only one, if there is one)."""
        if not self.config.profile or self.world.replica != 0 or iteration != min(1, self.config.es.iterations - 1):
            return nullcontext()
        file = Path(self.config.run.dir) / f"trace_rank{self.world.job.rank}.json.gz"
        return profile(on_trace_ready=lambda trace: trace.export_chrome_trace(str(file)))

    def close(self) -> None:
        self.scorer.close()
        if self.reporter:
            self.reporter.close()
