"""Assessing the layouts of a run, and suggesting one."""

from dataclasses import asdict, replace
from typing import Any

from shardes.config.schema import Config
from shardes.planning import time
from shardes.planning.layouts import Layout, Machine, configured_layout, possible_layouts
from shardes.planning.memory import rank_memory
from shardes.planning.shapes import read_shapes
from shardes.planning.time import Device
from shardes.planning.workload import Workload


class Planner:
    """Assesses layouts of one config on one machine.

    Args:
        device: the GPU's rates; None if they are unknown, as for CPUs.
        response: the tokens of a response.
    """

    def __init__(
        self,
        config: Config,
        workload: Workload,
        machine: Machine,
        device: Device | None,
        response: int,
    ):
        self.config, self.workload, self.machine = config, workload, machine
        self.device, self.response = device, response
        self.model, self.module = read_shapes(config)

    def configured(self) -> Layout:
        """The layout in the settings; ConfigError if it is not possible on the machine."""
        return configured_layout(self.config, self.module, self.machine)

    def assess(self, layout: Layout) -> dict[str, Any]:
        """A layout's memory, traffic and times, ready for JSON.

        "seconds" is None if the device is.
        """
        es = self.config.es
        memory = rank_memory(self.model, layout, self.workload, es.restore, self.machine.gpu_memory)
        traffic = time.traffic(self.model, layout, self.workload, es.population_size, self.response)
        return {
            "layout": {
                key: getattr(value, "value", value) for key, value in asdict(layout).items()
            },
            "fits": memory.fits(self.machine),
            "gpu": memory.gpu,
            "host": memory.host,
            "gpu_total": sum(memory.gpu.values()),
            "host_total_per_node": memory.host_per_node(self.machine),
            "members_per_replica": time.members_per_replica(layout, es.population_size),
            "network": asdict(traffic),
            "seconds": self._seconds(layout, self.device) if self.device else None,
        }

    def _seconds(self, layout: Layout, device: Device) -> dict[str, float]:
        es = self.config.es
        seconds = time.seconds(
            self.model,
            layout,
            self.workload,
            es.restore,
            es.population_size,
            self.response,
            device,
            self.machine,
        )
        return asdict(seconds) | {"total": seconds.total}

    def suggest(self) -> Layout | None:
        """The preferred layout that fits, or one that gathers in the same way and is 10 % faster.

        None if no layout fits.
        """
        best: Layout | None = None
        best_seconds = 0.0
        for layout in possible_layouts(self.config, self.module, self.machine):
            assessment = self.assess(layout)
            if not assessment["fits"]:
                continue
            seconds = assessment["seconds"]["total"] if assessment["seconds"] else 0.0
            if best is None:
                best, best_seconds = layout, seconds
                continue
            same_gathering = (layout.shard > 1, layout.gather) == (best.shard > 1, best.gather)
            if same_gathering and seconds < 0.9 * best_seconds:
                best, best_seconds = layout, seconds
        return best

    def nodes_needed(self) -> int | None:
        """The fewest nodes on which a layout fits, by doubling them seven times; None if none."""
        machine = self.machine
        try:
            for _ in range(7):
                self.machine = replace(self.machine, nodes=2 * self.machine.nodes)
                if self.suggest():
                    return self.machine.nodes
            return None
        finally:
            self.machine = machine
