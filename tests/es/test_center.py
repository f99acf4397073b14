"""The center: exact in copy mode, measured in subtract mode."""

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file

from shardes.config.schema import Restore
from shardes.es.center import open_center
from shardes.es.population import Member
from shardes.es.staging import Stager
from shardes.es.update import Update
from shardes.noise import LowRank, add_noise
from shardes.sharding.regions import ParameterShard, Region
from shardes.sharding.weight_files import WeightFiles


@dataclass
class Alone:
    """A world of one rank, as a center sees it."""

    device = torch.device("cpu")

    def sum(self, *values):
        return list(values)

    def sum_uint64(self, value):
        return value


@pytest.fixture
def base(tmp_path) -> WeightFiles:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(90, 70, generator=generator) * 0.02,
        "b": torch.randn(3000, generator=generator) * 0.02,
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return WeightFiles(tmp_path)


def make_shards(dtype: torch.dtype) -> list[ParameterShard]:
    """Columns 10 to 39 of `a`, and all of `b` with padding."""
    return [
        ParameterShard("a", (90, 70), torch.zeros(2700, dtype=dtype), (Region(10, 90, 30, 70),)),
        ParameterShard("b", (3000,), torch.zeros(3004, dtype=dtype), (Region.contiguous(0, 3000),)),
    ]


def live(shards) -> torch.Tensor:
    return torch.cat([shard.tensor for shard in shards])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fifty_members_leave_a_copied_center_as_it_was(base, dtype):
    shards = make_shards(dtype)
    center = open_center(Restore.copy, shards, Alone(), base)
    center.load_into_model()
    before, digest = live(shards).clone(), center.digest()
    for seed in range(50):
        with center.perturbed(Member(seed, 0.001)):
            assert not torch.equal(live(shards), before)
        center.load_into_model()
        assert torch.equal(live(shards), before)
    assert center.digest() == digest


def test_a_member_is_the_center_plus_noise_cast_once(base):
    shards = make_shards(torch.bfloat16)
    center = open_center(Restore.copy, shards, Alone(), base)
    with center.perturbed(Member(9, 0.01)):
        for shard in shards:
            expected = center.values(shard).clone()
            add_noise(expected, shard.name, shard.regions, [9], [0.01])
            assert torch.equal(shard.values, expected.bfloat16())


def test_low_rank_noise_is_on_matrices_alone(base):
    shards = make_shards(torch.bfloat16)
    center = open_center(Restore.copy, shards, Alone(), base, rank=2)
    before = [center.values(shard).clone() for shard in shards]
    kind = LowRank((90, 70), 2)
    for seed in (9, 10):
        with center.perturbed(Member(seed, 0.01)):
            expected = before[0].clone()
            add_noise(expected, "a", shards[0].regions, [seed], [0.01], low_rank=kind)
            assert torch.equal(shards[0].values, expected.bfloat16())
            assert torch.equal(shards[1].values, before[1].bfloat16())
    center.update(Update([1, 2], [1e-4, -2e-4], weight_decay=0.1, rank=2))
    assert torch.equal(center.values(shards[1]), before[1])
    expected = before[0] - before[0] * torch.tensor(0.1)
    add_noise(expected, "a", shards[0].regions, [1, 2], [1e-4, -2e-4], low_rank=kind)
    assert torch.equal(center.values(shards[0]), expected)


def test_updates_land_in_float32_and_the_live_weights_follow(base):
    shards = make_shards(torch.bfloat16)
    center = open_center(Restore.copy, shards, Alone(), base)
    expected = {shard.name: center.values(shard).clone() for shard in shards}
    center.load_into_model()
    live_before = live(shards).clone()
    with center.perturbed(Member(3, 0.01)):
        pass
    metrics = center.update(Update([1, 2], [1e-4, -2e-4]))
    for shard in shards:
        add_noise(expected[shard.name], shard.name, shard.regions, [1, 2], [1e-4, -2e-4])
        assert torch.equal(center.values(shard), expected[shard.name])
        assert torch.equal(shard.values, expected[shard.name].bfloat16())
    same = torch.cat([s.values for s in shards]) == torch.cat(
        [live_before[:2700], live_before[2700:5700]]
    )
    assert metrics == {"unmoved": same.double().mean().item()}
    assert 0.01 < metrics["unmoved"] < 0.99


@pytest.mark.parametrize("rank", [0, 2])
def test_staging_a_center_in_blocks_changes_no_bit(base, rank):
    whole, staged = (
        open_center(Restore.copy, make_shards(torch.bfloat16), Alone(), base, rank=rank)
        for _ in range(2)
    )
    staged._block = 997
    staged._stager = Stager(torch.device("cpu"), staged._block)
    for seed in range(2):
        for center in (whole, staged):
            with center.perturbed(Member(seed, 0.01)):
                pass
        assert torch.equal(live(whole._shards), live(staged._shards))
        changed = [
            center.update(Update([5, 6], [0.1, 0.2], rank=rank)) for center in (whole, staged)
        ]
        assert changed[0] == changed[1]
        assert whole.digest() == staged.digest()
        assert torch.equal(live(whole._shards), live(staged._shards))
    with staged.perturbed(Member(9, 0.01)):
        pass
    staged.load_into_model()
    assert torch.equal(live(whole._shards), live(staged._shards))


def test_what_subtracting_leaves_behind_is_measured(base, monkeypatch):
    monkeypatch.setattr("shardes.es.center.SAMPLE", 1)
    shards = make_shards(torch.bfloat16)
    center = open_center(Restore.subtract, shards, Alone(), base)
    before = torch.cat([shard.values for shard in shards]).double()
    for seed in range(10):
        with center.perturbed(Member(seed, 0.001)):
            pass
    drift = (
        (torch.cat([shard.values for shard in shards]).double() - before)
        .square()
        .mean()
        .sqrt()
        .item()
    )
    metrics = center.update(Update([1], [0.0]))
    assert drift > 0
    assert metrics["drift"] == pytest.approx(drift)
    assert 0 < metrics["drifted"] <= 1
    assert metrics["unmoved"] == 1
    assert center.update(Update([1], [0.0]))["drift"] == 0


def test_a_member_that_fails_half_way_is_undone(base, monkeypatch):
    for mode in Restore:
        shards = make_shards(torch.float32)
        center = open_center(mode, shards, Alone(), base)
        center.load_into_model()
        before = live(shards).clone()
        with pytest.raises(RuntimeError, match="reward"), center.perturbed(Member(3, 0.01)):
            raise RuntimeError("reward")
        center.load_into_model()
        assert torch.allclose(live(shards), before, atol=1e-7)

        def failing(x, name, *rest, **named):
            if name == "b" and rest[2][0] > 0:
                raise MemoryError
            add_noise(x, name, *rest, **named)

        monkeypatch.setattr("shardes.es.center.add_noise", failing)
        with pytest.raises(MemoryError), center.perturbed(Member(3, 0.01)):
            pass
        monkeypatch.undo()
        center.load_into_model()
        assert torch.allclose(live(shards), before, atol=1e-7)


def test_the_distance_from_the_base(base):
    shards = make_shards(torch.float32)
    center = open_center(Restore.copy, shards, Alone(), base)
    assert center.distance() == {"distance": 0, "distance_relative": 0}
    before = torch.cat([center.values(shard) for shard in shards]).double()
    center.update(Update([4], [0.01]))
    after = torch.cat([center.values(shard) for shard in shards]).double()
    distance = center.distance()
    assert distance["distance"] == pytest.approx((after - before).norm().item(), rel=1e-6)
    assert distance["distance_relative"] == pytest.approx(
        ((after - before).norm() / before.norm()).item(), rel=1e-6
    )
