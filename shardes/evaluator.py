"""Evaluation of the center itself: its rewards on both splits, and which center is the best so far.

All replicas share out the prompts, and none waits for the others: the responses must be complete
only when the center is about to move. The primary rank scores them afterwards, while the next
iteration's members are evaluated. What they scored is in the journal before it is acted on, so no
center is evaluated twice.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain

from shardes.config.schema import Config
from shardes.distributed.world import NOTHING, World
from shardes.errors import ConfigError
from shardes.es.center import Center
from shardes.es.population import Iteration, evaluated_numbers, held_out_numbers, select
from shardes.es.statistics import mean
from shardes.inference.sampler import Sampler, invalid_logits
from shardes.replicas.coordinator import Coordinator
from shardes.replicas.work_queue import WorkQueue
from shardes.reporting.reporter import Reporter
from shardes.rewards.scoring import REMEDY, Scorer
from shardes.storage.journal import Evaluation, Journal, is_better
from shardes.tasks import Split, Task, prompts_of

SPLITS: dict[Split, str] = {"train": "center_reward", "test": "held_out_reward"}  # and the metrics


@dataclass
class PendingEvaluation:
    """An evaluation whose responses are not yet complete, or not yet scored.

    A piece of the queue is a part of one split's prompts; its result is their responses' token ids.
    """

    iteration: Iteration
    queue: WorkQueue
    pieces: list[tuple[Split, slice]]
    distance: dict[str, float]
    complete: bool = False


class Evaluator:
    """Generates the center's responses. The primary rank's subclass also scores them.

    Args:
        prompts: the token ids of each split's prompts; of the held-out ones, those that are asked.
            Of the training prompts, the first iteration's are asked.
        distance: returns metrics of the center's distance from the base model; called by every rank
            of a replica.
        poll: called between decode steps.
        known: metrics of evaluations that the journal has, by iteration.
        best: the iteration before which the center was the best; None if none is known.

    Attributes:
        evaluations: the metrics of all evaluations, by iteration; complete on the primary rank.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        center: Center,
        sampler: Sampler,
        coordinator: Coordinator,
        prompts: dict[str, list[list[int]]],
        distance: Callable[[], dict[str, float]],
        poll: Callable[[], None],
        known: Mapping[int, dict[str, float]] = NOTHING,
        best: int | None = None,
    ):
        self._config, self._world, self._center, self._sampler = config, world, center, sampler
        self._coordinator = coordinator
        numbers = evaluated_numbers(config, len(prompts["train"]))
        self._prompts = prompts | {"train": select(prompts["train"], numbers)}
        self._distance, self._poll = distance, poll
        self._pending: PendingEvaluation | None = None
        self.evaluations = dict(known)
        self._best = best

    def due(self, t: int) -> bool:
        """Whether the center before iteration t, which is not the final one, is to be evaluated."""
        every = self._config.eval.every
        return t not in self.evaluations and (t == 0 or (every > 0 and t % every == 0))

    def start(self, iteration: Iteration) -> None:
        """Answer this replica's share of both splits' prompts with the center."""
        pieces: list[tuple[Split, slice]] = []
        for split in SPLITS:
            parts = min(self._world.replicas, len(self._prompts[split]))
            pieces += [(split, slice(part, None, parts)) for part in range(parts)]
        queue = self._coordinator.work_queue("evaluation", iteration.index, len(pieces))
        self._pending = PendingEvaluation(iteration, queue, pieces, self._distance())
        self._answer(self._pending, queue.claims())

    def complete(self) -> None:
        """Wait until all prompts are answered, also those of replicas that died.

        Then the center may move.
        """
        if self._pending and not self._pending.complete:
            orphans = chain.from_iterable(self._pending.queue.orphans())
            self._answer(self._pending, orphans)
            self._pending.complete = True

    def is_best(self, t: int) -> bool:
        """Whether the center before iteration t is the best so far, if the best one is to be kept.

        Every rank calls this; it waits until a pending evaluation is complete. Replicas other than
        0, which write no snapshots, return False.
        """
        if not self._config.checkpoint.best:
            return False
        self.complete()
        return bool(self._world.run_on_leader(lambda: self._find_best() == t))

    def finish(self, t: int) -> dict[str, float]:
        """Finish the evaluation of the center before iteration t, if there is one.

        Returns its metrics; empty on ranks other than the primary.
        """
        self._pending = None
        return {}

    def _find_best(self) -> int | None:
        """The iteration before which the center was the best, with any pending evaluation."""
        return None

    def poll(self) -> None:
        """To be called between decode steps; what it raises ends the run."""
        self._poll()

    def ended(self, split: Split, part: slice, row: int, response: list[int]) -> None:
        """To be called with each response, as token ids, when it ends.

        Args:
            row: its place in the part of the split.
        """

    def _answer(self, pending: PendingEvaluation, numbers: Iterable[int]) -> None:
        for number in numbers:
            split, part = pending.pieces[number]
            prompts = self._prompts[split][part]
            self._center.load_into_model()
            ended = partial(self.ended, split, part)
            responses = self._sampler.generate(prompts, poll=self.poll, ended=ended)
            failures = self._failures(pending, responses)
            if failures and self._config.task.on_error == "fail":
                raise ConfigError(f"prompts of {split}: {next(iter(failures.values()))}; {REMEDY}")
            pending.queue.post(number, json.dumps(responses))

    def _failures(self, pending: PendingEvaluation, responses: list[list[int]]) -> dict[int, str]:
        model = f"the center before iteration {pending.iteration.index}"
        return invalid_logits(responses, model, self._config.model.dtype)


class PrimaryEvaluator(Evaluator):
    """The evaluator of the primary rank: it scores the responses, and journals what they scored."""

    def __init__(
        self, *, task: Task, scorer: Scorer, reporter: Reporter, journal: Journal, **shared
    ):
        super().__init__(**shared)
        self._task, self._scorer, self._reporter = task, scorer, reporter
        self._journal = journal

    def start(self, iteration: Iteration) -> None:
        self._reporter.evaluating(begins=True)
        super().start(iteration)

    def poll(self) -> None:
        super().poll()
        self._reporter.evaluating()

    def ended(self, split: Split, part: slice, row: int, response: list[int]) -> None:
        """Try out the reward with this start's first response."""
        if response and not self._scorer.is_tried:  # an empty one could not be completed
            numbers = self._numbers(split) or range(len(self._prompts[split]))
            (text,) = self._sampler.texts([response])
            self._scorer.try_out(split, text, numbers[part][row])

    def finish(self, t: int) -> dict[str, float]:
        self._score_pending()
        return self.evaluations.get(t, {})

    def _find_best(self) -> int | None:
        self._score_pending()
        return self._best

    def _score_pending(self) -> None:
        if self._pending is None:
            return
        self._reporter.evaluating()
        evaluation = self._score(self._pending)
        self._journal.append(evaluation)
        t, self._pending = evaluation.iteration, None
        best = None if self._best is None else self.evaluations[self._best]
        if is_better(evaluation.metrics, best):
            self._best = t
        self.evaluations[t] = evaluation.metrics

    def _score(self, pending: PendingEvaluation) -> Evaluation:
        """The center's rewards on both splits and its distance from the base; its responses become
        samples.
        """
        results = list(map(json.loads, pending.queue.collect()))
        iteration, metrics = pending.iteration, {}
        all_rewards: dict[str, list[float]] = {}
        for split, name in SPLITS.items():
            numbers = self._numbers(split)
            tokens: list[list[int]] = [[] for _ in self._prompts[split]]
            for (piece_split, part), responses in zip(pending.pieces, results, strict=True):
                if piece_split == split:
                    tokens[part] = responses
            texts = self._sampler.texts(tokens)
            rewards = self._scorer(split, texts, numbers, self._failures(pending, tokens))
            metrics[name], all_rewards[split] = mean(rewards), rewards
            correct = self._scorer.correct(split, texts, numbers) if split == "test" else None
            if correct is not None:
                metrics["held_out_accuracy"] = mean(correct)
            prompts = select(prompts_of(self._task, split), numbers)
            self._reporter.samples(iteration.index, split, prompts, texts, rewards)
        failures = self._scorer.take_failures().items()
        failed = {f"evaluation_{name}": count for name, count in failures}
        metrics |= failed | pending.distance
        return Evaluation(iteration.index, iteration.digest, metrics, all_rewards)

    def _numbers(self, split: Split) -> list[int] | None:
        """The numbers of the prompts that evaluations ask; None for all of the split."""
        count = len(prompts_of(self._task, split))
        if split == "train":
            return evaluated_numbers(self._config, count)
        return held_out_numbers(self._config.eval.prompts, count)
