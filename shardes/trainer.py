"""The loop: Algorithm 2 of the paper."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from shardes.center import Center, member
from shardes.config import Config, ConfigError, Restore
from shardes.engines import Engine
from shardes.generation import Greedy
from shardes.journal import Journal, Record
from shardes.metrics import Clock, Reporter
from shardes.population import Evaluation, Population, mean, member_seeds, std, update_coefficients
from shardes.tasks import Task
from shardes.weights import WeightFiles
from shardes.world import World


@dataclass
class Responses:
    """What the live weights answered to a split's prompts, and at what cost."""

    texts: list[str]
    tokens: int


class Trainer:
    """Everything one rank needs for a run. `encoded` holds each split's prompts as token ids."""

    def __init__(
        self,
        config: Config,
        world: World,
        engine: Engine,
        center: Center,
        base: WeightFiles,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        greedy: Greedy,
        encoded: dict[str, list[list[int]]],
    ):
        self.config = config
        self.world = world
        self.engine = engine
        self.center = center
        self.base = base
        self.task = task
        self.tokenizer = tokenizer
        self.greedy = greedy
        self.encoded = encoded
        self.clock = Clock()
        self.reporter: Reporter | None = None
        self.journal: Journal | None = None
        if world.speaks:
            directory = Path(config.run.dir)
            self.reporter = Reporter(directory, config.es.iterations, config.es.population_size)
            self.journal = Journal(directory / "journal.jsonl")
            if config.es.restore is Restore.subtract and world.replicas > 1:
                self.reporter.say(
                    "warning: es.restore=subtract: each replica's center drifts by itself; only copy is exact"
                )

    def run(self) -> None:
        """Train, from iteration 0 to the last."""
        started = time.monotonic()
        means, evaluations = [], []
        for iteration in range(self.config.es.iterations):
            every = self.config.eval.every
            due = iteration == 0 or (every > 0 and iteration % every == 0)
            evaluated = self.evaluate(iteration) if due else {}
            metrics = self.iterate(iteration)
            means.append(metrics["reward_mean"])
            evaluations += [evaluated] if due else []
            if self.reporter:
                self.reporter.iteration(metrics | evaluated)
        evaluations.append(self.evaluate(self.config.es.iterations))
        digest = self.center.digest()
        if self.reporter:
            first, last = evaluations[0], evaluations[-1]
            summary = {
                "iterations": len(means),
                "reward_mean_first": means[0],
                "reward_mean_last": means[-1],
                **{f"{name}_first": first[name] for name in ("center_reward", "held_out_reward")},
                **{f"{name}_last": last[name] for name in ("center_reward", "held_out_reward")},
                "distance": last["distance"],
                "distance_relative": last["distance_relative"],
                "digest": digest,
                "seconds": time.monotonic() - started,
            }
            self.reporter.summary(summary)
            self.reporter.say(
                f"done: member reward {means[0]:.2f} → {means[-1]:.2f}, center's {first['center_reward']:.2f} → "
                f"{last['center_reward']:.2f}, held-out {first['held_out_reward']:.2f} → "
                f"{last['held_out_reward']:.2f}; {summary['seconds']:.0f} s, center {digest}"
            )

    def iterate(self, iteration: int) -> dict[str, float]:
        """One iteration: evaluate the population, journal it, update the center. Returns its metrics."""
        es, clock = self.config.es, Clock()
        self.clock, started = clock, time.perf_counter()
        digest = self.center.digest()
        seeds = member_seeds(es.seed, iteration, es.population_size)
        population = Population(self.world, iteration, seeds, self.config.run.timeout)

        def poll():
            if self.reporter and self.reporter.due():
                self.reporter.members(iteration, population.done())

        for number in population.claim():
            with member(self.center, seeds[number], es.sigma, clock):
                responses = self.respond("train", poll)
            population.post(number, Evaluation(self.reward("train", responses), responses.tokens))

        with clock("exchange"):
            evaluations = population.collect(poll)
        rewards = [evaluation.reward for evaluation in evaluations]
        coefficients = update_coefficients(rewards, es.alpha)
        if self.reporter and not any(coefficients) and es.alpha:
            self.reporter.say(
                f"warning: iteration {iteration}: all {len(rewards)} rewards are {rewards[0]}, so nothing is learned; "
                "a larger es.sigma or a finer reward would tell the members apart"
            )
        with clock("exchange"):
            if self.journal:
                self.journal.append(Record(iteration, seeds, rewards, coefficients, es.sigma, es.alpha, digest))
                population.publish("journalled")
            population.await_published("journalled")

        with clock("update"):
            updated = self.center.update(seeds, coefficients)

        parts = ("perturb", "gather", "generate", "restore", "update", "exchange")
        return {
            "iteration": iteration,
            "reward_mean": mean(rewards),
            "reward_std": std(rewards),
            "reward_min": min(rewards),
            "reward_max": max(rewards),
            "seconds": time.perf_counter() - started,
            **{f"seconds_{part}": clock.seconds[part] for part in parts},
            "generated_tokens": sum(evaluation.tokens for evaluation in evaluations),
            **updated,
        }

    def evaluate(self, iteration: int) -> dict[str, float]:
        """The center's own rewards on both splits, its distance from the base, its responses as samples.

        Replica 0 does this; the others go on to the next members. Empty elsewhere.
        """
        if self.world.replica != 0:
            return {}
        metrics = {}
        for split, name in (("train", "center_reward"), ("test", "held_out_reward")):
            responses = self.respond(split)
            if self.reporter:
                rewards = self.score(split, responses.texts)
                metrics[name] = mean(rewards)
                self.reporter.samples(iteration, split, self.task.prompts(split), responses.texts, rewards)
        metrics |= self.center.distance(self.base)
        return metrics

    def respond(self, split: str, poll=lambda: None) -> Responses:
        """The live weights' greedy responses to a split's prompts; the shard axis splits the prompts."""
        prompts = self.encoded[split]
        group = self.world.mesh.get_group("shard")
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        lockstep = group if self.engine.lockstep else None
        with ExitStack() as stack:
            with self.clock("gather"):
                module = stack.enter_context(self.engine.ready())
            with self.clock("generate"):
                mine = self.greedy(
                    module, prompts[rank::ranks], vocabulary=self.engine.vocabulary, lockstep=lockstep, poll=poll
                )
        with self.clock("exchange"):
            everyone = self._exchange(mine, len(prompts), rank, ranks, group)
        texts = self.tokenizer.batch_decode(everyone, skip_special_tokens=True) if self.world.leads else []
        return Responses(texts, sum(map(len, everyone)))

    def _exchange(self, mine: Sequence[list[int]], count: int, rank: int, ranks: int, group) -> list[list[int]]:
        """All ranks' responses in prompt order, where rank r holds those of prompts r, r + ranks, ..."""
        if ranks == 1:
            return list(mine)
        width = self.config.generation.max_new_tokens
        table = torch.zeros(-(-count // ranks), 1 + width, dtype=torch.long, device=self.world.device)
        for row, tokens in zip(table, mine, strict=False):
            row[: 1 + len(tokens)] = torch.tensor([len(tokens), *tokens])
        tables = table.new_empty(ranks * len(table), 1 + width)
        dist.all_gather_into_tensor(tables, table, group=group)
        rows = tables.view(ranks, *table.shape).transpose(0, 1).reshape(-1, 1 + width)[:count].tolist()
        return [row[1 : 1 + row[0]] for row in rows]

    def reward(self, split: str, responses: Responses) -> float:
        """The mean of the responses' rewards, on the rank that leads the replica; 0 elsewhere."""
        if not self.world.leads:
            return 0.0
        return mean(self.score(split, responses.texts))

    def score(self, split: str, texts: list[str]) -> list[float]:
        """The task's rewards, one per response."""
        rewards = list(map(float, self.task.score(split, texts)))
        if len(rewards) != len(texts):
            raise ConfigError(f"task: score gave {len(rewards)} rewards for {len(texts)} responses")
        return rewards

    def close(self) -> None:
        if self.reporter:
            self.reporter.close()
            self.journal.close()
