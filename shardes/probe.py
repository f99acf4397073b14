"""A probe: what the members of one iteration say of σ, before a run is started.

Antithetic pairs θ ± σ·ε at several σ answer the iteration's prompts, with the same seeds at each σ.
Replicas share out the members as in training, and every rank of a replica makes the same calls.
Nothing is journaled, and the center does not move. `shardes.es.tuning` says what follows from the
rewards.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import islice

from shardes.config.schema import Config
from shardes.errors import ConfigError
from shardes.es.probing import Answered, CenterAnswers, Plan
from shardes.es.statistics import mean
from shardes.inference.sampler import invalid_logits
from shardes.launch import Replica
from shardes.replicas.work_queue import WorkQueue
from shardes.rewards.scoring import REMEDY, Scorer


class Probe:
    """One rank of a probe.

    Args:
        queue: its pieces are the plan's members.
        poll: called between decode steps; what it raises ends the probe.
    """

    def __init__(
        self,
        config: Config,
        plan: Plan,
        replica: Replica,
        scorer: Scorer,
        queue: WorkQueue,
        poll: Callable[[], None],
    ):
        self._config, self._plan, self._replica = config, plan, replica
        self._scorer, self._queue, self._poll = scorer, queue, poll
        self._center_tokens: list[list[int]] = []

    def answer_with_center(self) -> CenterAnswers:
        """Let the center answer. On the primary rank, which scores, returns what that is worth.

        Every replica does this: changed answers are counted where the members are evaluated.

        Raises:
            ConfigError: the model could not complete an answer, with task.on_error=fail.
        """
        self._replica.center.load_into_model()
        prompts, config = self._plan.iteration.prompts, self._config
        self._center_tokens = self._replica.sampler.generate(prompts, poll=self._poll)
        invalid = invalid_logits(self._center_tokens, "the center", config.model.dtype)
        if invalid and config.task.on_error == "fail":
            raise ConfigError(f"prompts of train: {next(iter(invalid.values()))}; {REMEDY}")
        scored: list[Answered] = []

        def score() -> None:
            scored.extend(self._scored(self._center_tokens, "the center") for _ in range(2))

        if self._replica.world.replica == 0:
            self._replica.world.run_on_leader(score)
        if not scored:
            return CenterAnswers(Answered([], 0, 0, 0, 0, 0), 0.0)
        once, again = (answered.rewards for answered in scored)
        squares = [(a - b) ** 2 / 2 for a, b in zip(once, again, strict=True)]
        return CenterAnswers(scored[0], mean(squares or [0.0]) ** 0.5)

    def answer_with_members(self) -> None:
        """Evaluate members for this replica until every one has been claimed."""
        answers, iteration = self._replica.answers, self._plan.iteration
        claims, size = self._queue.claims(), answers.group_size(iteration)
        while group := list(islice(claims, size)):
            answered: dict[int, list[list[int]]] = {}
            answers.generate(iteration, group, self._poll, answered.__setitem__)
            for number in group:
                post = partial(self._post, number, answered[number])
                self._replica.world.run_on_leader(post)

    def results(self) -> dict[int, Answered]:
        """All members' results, on the primary rank; waits for the other replicas."""
        return dict(enumerate(map(_read, self._queue.collect())))

    def results_so_far(self) -> dict[int, Answered]:
        """The results that are there, on the primary rank."""
        return {number: _read(text) for number, text in self._queue.news()}

    def _post(self, number: int, tokens: list[list[int]]) -> None:
        member = self._plan.iteration.members[number]
        answered = self._scored(tokens, f"a member (σ = {abs(member.sigma):g}, seed {member.seed})")
        self._queue.post(number, json.dumps(asdict(answered)))

    def _scored(self, tokens: list[list[int]], model: str) -> Answered:
        """Score a model's answers."""
        sampler, numbers = self._replica.sampler, self._plan.iteration.prompt_numbers
        texts = sampler.texts(tokens)
        invalid = invalid_logits(tokens, model, self._config.model.dtype)
        rewards: list[float] = []
        failed = len(invalid)
        if not (invalid and self._config.task.on_error == "fail"):
            rewards = self._scorer("train", texts, numbers, invalid)
            failed = self._scorer.take_failures()["scoring_failures"]
        kinds = [
            kind
            for row, kind in enumerate(sampler.answer_kinds(tokens, texts))
            if row not in invalid
        ]
        changed = sum(a != b for a, b in zip(tokens, self._center_tokens, strict=True))
        lengths = sum(map(len, tokens))
        return Answered(
            rewards, changed, kinds.count("empty"), kinds.count("unended"), failed, lengths
        )


def _read(text: str) -> Answered:
    return Answered(**json.loads(text))
