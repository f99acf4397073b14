"""Members of low-rank noise that answer side by side, compared with full noise and with none."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.generation import prompts
from benchmarks.measure import Row, ratios
from shardes.clock import Clock
from shardes.config.schema import Restore
from shardes.engines.linear import use_own_forward
from shardes.es.center import open_center
from shardes.es.population import Member
from shardes.es.side_by_side import SideBySide
from shardes.inference.generation import Decoder
from shardes.inference.prompts import encode
from shardes.sharding.regions import ParameterShard, Region
from shardes.sharding.weight_files import WeightFiles

SIGMA = 0.002


class Population:
    """Members of one model on one rank, each with full noise or with noise of low rank."""

    def __init__(
        self,
        directory: Path,
        rank: int,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval().to(device)
        self.model.requires_grad_(False)
        use_own_forward(self.model)
        shards = []
        for name, param in self.model.named_parameters():
            whole = (Region.contiguous(0, param.numel()),)
            shards.append(ParameterShard(name, tuple(param.shape), param.view(-1), whole, whole))
        world = SimpleNamespace(device=torch.device(device))
        self.center = open_center(Restore.copy, shards, world, WeightFiles(directory))
        self.side_by_side = SideBySide(self.model, shards, world.device, rank)

    def decoder(self, new_tokens: int) -> Decoder:
        """Without end-of-sequence tokens, so that every response has `new_tokens` tokens."""
        return Decoder(self.tokenizer, new_tokens, frozenset(), (), 1 << 20)

    def one_after_another(self, decode: Decoder, rows: Sequence, members: int) -> None:
        for seed in range(members):
            with self.center.perturbed(Member(seed, SIGMA)):
                decode(self.model, rows)

    def together(self, decode: Decoder, rows: Sequence, members: int) -> None:
        self.center.load_into_model()
        with self.side_by_side.members([Member(s, SIGMA) for s in range(members)], Clock()):
            self._decode(decode, rows, members)

    def _decode(self, decode: Decoder, rows: Sequence, members: int) -> None:
        numbers = [number for number in range(members) for _ in rows]
        set_members = self.side_by_side.set_rows
        decode(self.model, [*rows] * members, members=numbers, set_members=set_members)


def rows(directory: Path, toy: bool) -> Iterator[Row]:
    members = 3 if toy else 16
    for rank in (1, 4):
        population = Population(directory, rank)
        for count, new_tokens, target in ((2, 8, None),) if toy else ((2, 32, 4), (32, 64, 1.1)):
            encoded = encode(population.tokenizer, prompts(count))
            decode = population.decoder(new_tokens)
            work = (decode, encoded, members)
            values, time = ratios(
                partial(population.together, *work),
                partial(population.one_after_another, *work),
                2 if toy or count > 2 else 5,
            )
            what = f"{members} members, r = {rank}, {count} prompts × {new_tokens} tokens"
            note = f"{members / time:.2g} members/s"
            goal = target if rank == 1 else None
            yield Row(f"members: {rank}, {count}", what, "full noise", goal, values, note=note)
        yield _term(population, rank, 2 if toy else 5)


def _term(population: Population, rank: int, repeats: int) -> Row:
    """What the low-rank term adds to the time of a batch."""
    encoded = encode(population.tokenizer, prompts(2))
    decode, members = population.decoder(32), 16
    with population.side_by_side.members([Member(s, SIGMA) for s in range(members)], Clock()):
        values, _ = ratios(
            lambda: decode(population.model, encoded * members),
            lambda: population._decode(decode, encoded, members),
            repeats,
        )
    what, goal = f"a batch of 32 rows with the term, r = {rank}", 1.15 if rank == 1 else None
    return Row(f"term: {rank}", what, "without it", goal, values, at_most=True)
