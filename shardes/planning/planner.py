"""Assessing plans of a run on a machine, and searching for the fastest that fit."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from shardes.config.schema import CenterDevice, Config, EngineName, Noise, Offload, Restore
from shardes.errors import ConfigError
from shardes.es.adapted_members import check_adapters
from shardes.es.matrix_layers import check_members_can_share
from shardes.es.population import check_rank
from shardes.es.side_by_side import answer_side_by_side, members_together
from shardes.planning.devices import Device
from shardes.planning.layouts import Layout, Machine, configured_layout, possible_layouts
from shardes.planning.memory import (
    Memory,
    cached_tokens,
    center_on_device,
    rank_memory,
    vllm_memory,
)
from shardes.planning.run import whole_run
from shardes.planning.shapes import ModelShapes, read_shapes, splits_experts
from shardes.planning.time import Estimate
from shardes.planning.workload import Workload

DECODING = (EngineName.deepspeed, EngineName.fsdp)  # engines with the project's decoder
NEAR = 1.1  # plans that take at most this times the shortest time count as equally fast
STEPS = 8  # of the search for the largest batch


@dataclass(frozen=True)
class Plan:
    """What a search decides: settings that change memory and speed, but not the center.

    Attributes:
        members: how many members answer side by side; 1: one after another.
        center: where the float32 center lies; None: there is no choice.
    """

    engine: EngineName
    layout: Layout
    batch_tokens: int
    members: int = 1
    center: CenterDevice | None = None

    def __str__(self) -> str:
        text = f"{self.layout}, batch_tokens={self.batch_tokens}"
        text += f", {self.members} members side by side" * (self.members > 1)
        return text + ", center on the GPU" * self.center_on_device

    @property
    def center_on_device(self) -> bool:
        return self.center is CenterDevice.device

    def settings(self, config: Config) -> str:
        """The plan as `key=value` overrides of a config."""
        layout = self.layout
        values = {
            "sharding.shard": layout.shard,
            "sharding.tensor": layout.tensor,
            "sharding.gather": layout.gather.value,
            "sharding.offload": layout.offload.value,
            "generation.batch_tokens": self.batch_tokens,
        }
        if self.engine is EngineName.vllm:  # which refuses the others' keys, or ignores them
            values = {"sharding.tensor": layout.tensor}
        if config.es.noise is Noise.low_rank:
            values["es.members_per_batch"] = self.members
        if self.engine is not config.engine:
            values["engine"] = self.engine.value
        if config.sharding.replicas is not None:
            values["sharding.replicas"] = layout.replicas
        if self.center is not None:
            values["center.device"] = self.center.value
        return " ".join(f"{key}={value}" for key, value in values.items())


class Planner:
    """Assesses plans of one config on one machine.

    Args:
        response: the tokens of a response.
    """

    def __init__(
        self, config: Config, workload: Workload, machine: Machine, device: Device, response: int
    ):
        self.config, self.workload, self.machine = config, workload, machine
        self.device, self.response = device, response
        self._models: dict[EngineName, tuple[ModelShapes, PreTrainedModel]] = {}

    @property
    def model(self) -> ModelShapes:
        return self._read(self.config.engine)[0]

    def configured(self) -> Plan:
        """The plan in the settings.

        Raises:
            ConfigError: training would refuse them: the layout is not possible on the machine,
                es.rank is too large, or members of this model cannot answer side by side.
        """
        engine, generation = self.config.engine, self.config.generation
        model, module = self._read(engine)
        check_rank(self.config.es, ((p.name, p.shape) for p in model.parameters))
        layout = configured_layout(self.config, module, self.machine)
        if engine is EngineName.vllm and (problem := self._beyond_cache(layout)):
            raise ConfigError(problem)
        members = members_together(self.config, self.workload.train, layout.replicas)
        if members > 1:
            self._check_sharing()
            if splits_experts(model, layout.tensor):
                raise ConfigError(
                    f"es.members_per_batch={members}: low-rank members cannot share experts that "
                    f"sharding.tensor={layout.tensor} splits; set es.members_per_batch=1, or "
                    "sharding.tensor=1"
                )
        center, *_ = self._centers(layout)
        memory = self.machine.gpu_memory
        if center and not center_on_device(self.config, model, module.config, memory):
            center = CenterDevice.host
        plan = Plan(engine, layout, generation.batch_tokens, members, center)
        is_free = engine is EngineName.vllm and self.config.center.device is CenterDevice.auto
        if is_free and not self.memory(plan).fits(self.machine):  # beside vLLM's cache
            return replace(plan, center=center and CenterDevice.host)
        return plan

    def assess(self, plan: Plan) -> dict[str, Any]:
        """A plan's memory, traffic and times, ready for JSON."""
        memory, estimate = self.memory(plan), self.estimate(plan)
        seconds = estimate.seconds()
        layout = asdict(plan.layout) | {"engine": plan.engine}
        return {
            "plan": str(plan),
            "layout": {key: getattr(value, "value", value) for key, value in layout.items()},
            "batch_tokens": plan.batch_tokens,
            "members_per_batch": plan.members,
            "center_device": plan.center and plan.center.value,
            "settings": plan.settings(self.config),
            "fits": memory.fits(self.machine),
            "gpu": memory.gpu,
            "host": memory.host,
            "gpu_total": sum(memory.gpu.values()),
            "host_total_per_node": memory.host_per_node(self.machine),
            "members_per_replica": estimate.members,
            "network": asdict(estimate.traffic()),
            "seconds": asdict(seconds) | {"total": seconds.total},
            "run": whole_run(self.config, estimate),
        }

    def memory(self, plan: Plan) -> Memory:
        model, workload, es = self._read(plan.engine)[0], self._work(plan), self.config.es
        gpu_memory = self.machine.gpu_memory
        on_device = plan.center_on_device
        if plan.engine is EngineName.vllm:
            vllm = self.config.vllm
            return vllm_memory(model, plan.layout, workload, es, vllm, gpu_memory, on_device)
        return rank_memory(model, plan.layout, workload, es, gpu_memory, center_on_device=on_device)

    def estimate(self, plan: Plan) -> Estimate:
        return Estimate(
            self._read(plan.engine)[0],
            plan.layout,
            self._work(plan),
            self.config.es,
            self.response,
            self.device,
            self.machine,
            plan.center_on_device,
        )

    def search(self, count: int = 4) -> list[Plan]:
        """The best plans that fit, at most one per layout: first the suggested one, then by time.

        Suggested is, of the plans that are nearly as fast as the fastest, the one with the
        preferred layout. Empty: nothing fits.
        """
        by_layout: dict[Layout, tuple[float, Plan]] = {}
        for plan in self._fitting():
            seconds = self.estimate(plan).seconds().total
            best = by_layout.get(plan.layout)
            # Plans of the configured engine come first, then those with a center on the GPU, and of
            # these the largest groups of members.
            if best is None or NEAR * seconds < best[0]:
                by_layout[plan.layout] = seconds, plan
        ranked = sorted(by_layout.values(), key=lambda pair: pair[0])
        near = [plan for seconds, plan in ranked if seconds <= NEAR * ranked[0][0]]
        suggested = min(near, key=lambda plan: plan.layout.preference, default=None)
        others = [plan for _, plan in ranked if plan != suggested]
        return [suggested, *others][:count] if suggested else []

    def nodes_needed(self) -> int | None:
        """The fewest nodes on which a plan fits, by doubling them seven times; None if none."""
        machine = self.machine
        try:
            for _ in range(7):
                self.machine = replace(self.machine, nodes=2 * self.machine.nodes)
                if next(self._fitting(), None):
                    return self.machine.nodes
            return None
        finally:
            self.machine = machine

    def _fitting(self) -> Iterator[Plan]:
        """The plans that fit, each with the largest batches that fit."""
        own = self.config.engine
        engines = sorted(DECODING, key=lambda engine: engine is not own)
        for engine in engines if own in DECODING else [own]:
            config = replace(self.config, engine=engine)
            for layouts in possible_layouts(config, self._read(engine)[1], self.machine):
                for layout in layouts:  # offloads only if it does not fit otherwise
                    plans = list(self._filled(engine, layout))
                    yield from plans
                    if plans:
                        break

    def _filled(self, engine: EngineName, layout: Layout) -> Iterator[Plan]:
        if engine is EngineName.vllm:
            own = self._with_vllm(layout)
            plans = (replace(own, center=center) for center in self._centers(layout))
            if not self._beyond_cache(layout):
                yield from (plan for plan in plans if self.memory(plan).fits(self.machine))
            return
        row = self.workload.length(max(self.workload.train + self.workload.test))
        for center in self._centers(layout):
            start = Plan(engine, layout, row, center=center)
            for members in self._member_counts(start):
                plan = replace(start, members=members)
                whole = replace(self.workload, members=members).whole(layout)

                def room(tokens: int, plan: Plan = plan) -> float:
                    return self._room(replace(plan, batch_tokens=tokens))

                tokens = largest(room, min(row, whole), whole)
                if tokens is None:
                    continue
                if tokens < whole:
                    tokens = max(tokens - tokens % 10 ** max(len(str(tokens)) - 3, 0), row)
                filled = replace(plan, batch_tokens=tokens)
                if self.memory(filled).fits(self.machine):
                    yield filled

    def _with_vllm(self, layout: Layout) -> Plan:
        """The plan of a layout with vLLM, which forms its batches itself."""
        config, members = self.config, 1
        if answer_side_by_side(config.es) and self._can_share:
            members = members_together(config, self.workload.train, layout.replicas)
        return Plan(config.engine, layout, config.generation.batch_tokens, members)

    def _centers(self, layout: Layout) -> list[CenterDevice | None]:
        """Where a float32 center may lie; None: there is no choice."""
        copies = self.config.es.restore is Restore.copy
        if self.machine.gpu_memory is None or not copies or layout.offload is Offload.cpu:
            return [None]
        return [CenterDevice.device, CenterDevice.host]

    def _beyond_cache(self, layout: Layout) -> str:
        """Why vLLM would refuse its cache, if it would: a request must fit."""
        vllm, workload = self.config.vllm, self.workload
        longest = max(workload.train + workload.test) + workload.max_new_tokens
        held = cached_tokens(self.model, layout.tensor, vllm)
        tokens = vllm.max_model_len or longest
        if tokens <= held:
            return ""
        return (
            f"vllm.cache_size={vllm.cache_size:g}: holds {held} tokens with sharding.tensor="
            f"{layout.tensor}, and a request may have {tokens}; raise it"
        )

    def _member_counts(self, plan: Plan) -> list[int]:
        """How many members may answer side by side: all of a replica's, or as many as one batch
        holds, or one.
        """
        layout = plan.layout
        if self.config.es.noise is Noise.full or not self._can_share:
            return [1]
        if splits_experts(self._read(plan.engine)[0], layout.tensor):
            return [1]
        share = -(-self.config.es.population_size // layout.replicas)

        def room(members: int) -> float:
            whole = replace(self.workload, members=members).whole(layout)
            return self._room(replace(plan, batch_tokens=whole, members=members))

        held = largest(room, 1, share) or 1
        balanced = -(-share // -(-share // held))
        return sorted({1, balanced, share}, reverse=True)

    @cached_property
    def _can_share(self) -> bool:
        """Whether members of this model can answer side by side."""
        try:
            self._check_sharing()
        except ConfigError:
            return False
        return True

    def _check_sharing(self) -> None:
        module, es = self._read(self.config.engine)[1], self.config.es
        check_members_can_share(module, es)
        if self.config.engine is EngineName.vllm:
            check_adapters(module, es)

    def _room(self, plan: Plan) -> float:
        return self.memory(plan).room(self.machine)

    def _work(self, plan: Plan) -> Workload:
        return replace(self.workload, batch_tokens=plan.batch_tokens, members=plan.members)

    def _read(self, engine: EngineName) -> tuple[ModelShapes, PreTrainedModel]:
        if engine not in self._models:
            module = next((module for _, module in self._models.values()), None)
            self._models[engine] = read_shapes(replace(self.config, engine=engine), module)
        return self._models[engine]


def largest(room: Callable[[int], float], low: int, high: int) -> int | None:
    """About the largest number from `low` to `high` with room; None if there is none.

    Room shrinks about linearly with the number, so that a few interpolations find it.
    """
    at_low, at_high = room(low), room(high)
    if at_low < 0:
        return None
    if at_high >= 0:
        return high
    for _ in range(STEPS):
        if at_low - at_high <= 0 or high - low <= max(low // 100, 1):
            break
        middle = low + int((high - low) * at_low / (at_low - at_high))
        middle = min(max(middle, low + 1), high - 1)
        if (at_middle := room(middle)) >= 0:
            low, at_low = middle, at_middle
        else:
            high, at_high = middle, at_middle
    return low
