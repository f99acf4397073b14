"""The Triton kernel without a GPU: triton_noise.py interpret | launch CAPABILITY [all]"""

import itertools
import os
import sys

if sys.argv[1] == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"

from types import SimpleNamespace

import numpy as np
import torch

from shardes.noise import cuda, reference
from shardes.noise.low_rank import LowRank
from shardes.sharding.regions import Region

LAYOUTS = [
    [Region.contiguous(5, 1)],
    [Region.contiguous(3, 3001)],
    [Region.contiguous(8, 1024), Region(16, 2, 1024, 4096), Region(2048, 2, 1021, 4100)],
    [Region(5, 37, 91, 1003), Region.contiguous(2**45 + 3, 5)],
    [Region(7, 20, 1, 9)],
    [],
]
LOW_RANK = [
    ((40, 300), 1, [Region.contiguous(7, 11_000)]),
    ((3, 40, 50), 3, [Region.contiguous(1, 5990)]),
    ((40, 50), 2, [Region(10, 40, 25, 50), Region.contiguous(3, 5)]),
    ((2**20, 2**20), 2, [Region(2**39 + 2**20 - 3, 3, 3, 2**20)]),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL_PAIRS = list(itertools.product(DTYPES, DTYPES))


def interpret() -> None:
    """Assert that the interpreted kernel and the reference agree to the bit."""
    for regions in LAYOUTS:
        count = sum(region.numel for region in regions)
        for dtype in DTYPES:
            for out_dtype in DTYPES:
                for terms in (1, 3):
                    x = torch.randn(count + 3, generator=torch.Generator().manual_seed(terms)).to(
                        dtype
                    )
                    seeds = [3, 2**63 + 5, 7][:terms]
                    coefficients = [float(np.float32(c)) for c in (0.5, -1.25, 0.001)][:terms]
                    made = [torch.zeros(count + 3, dtype=out_dtype) for _ in range(2)]
                    for kernel, out in zip((cuda, reference), made, strict=True):
                        kernel.add_noise(x, "w", regions, seeds, coefficients, out)
                    assert torch.equal(*made), (regions, dtype, out_dtype, terms)


def interpret_low_rank() -> None:
    """The same for low-rank noise, once with a limit that cuts blocks in both directions."""
    for shape, rank, regions in LOW_RANK:
        cuda.FACTORS = 40 * 6 * rank if shape == (40, 50) else 1 << 26
        count = sum(region.numel for region in regions)
        for dtype, out_dtype in zip(DTYPES, (*DTYPES[1:], DTYPES[0]), strict=True):
            x = torch.randn(count + 3, generator=torch.Generator().manual_seed(1)).to(dtype)
            low_rank = LowRank(shape, rank)
            terms = [3, 2**63 + 5, 7], low_rank.scaled([0.5, -1.25, 0.001])
            made = [torch.zeros(count + 3, dtype=out_dtype) for _ in range(2)]
            for kernel, out in zip((cuda, reference), made, strict=True):
                kernel.add_low_rank_noise(x, "w", regions, *terms, out, low_rank)
            assert torch.equal(*made), (shape, rank, regions, dtype, out_dtype)


class NoDevice:
    """Triton's driver for a GPU that is not there: it compiles, and launches nothing."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)
        self.kernels: dict[tuple, dict[str, object]] = {}  # by name and types of the arguments
        self.utils = SimpleNamespace(
            load_binary=lambda *binary: (object(), 0, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
        )

    def get_current_target(self):
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source, metadata):
        key = source.fn.__name__, *source.signature.values()
        assert key not in self.kernels, f"compiled again for other values: {key}"
        self.kernels[key] = metadata
        return lambda *arguments: None


def launch(capability: int, pairs: list[tuple[torch.dtype, torch.dtype]]) -> None:
    """Go the whole way to the launch, for all layouts; print the kernels' PTX.

    Args:
        pairs: the dtypes of what is read and of what is written.
    """
    from triton.runtime import driver

    device = NoDevice(capability)
    driver.set_active(device)
    seeds, coefficients = [3, 2**63 + 5], [0.5, -1.25]
    for pair in pairs:
        for name in ("w", "v", "model.norm.weight"):  # of keys below and above 2**31
            for regions in LAYOUTS:
                x, out = (allocate(regions, dtype) for dtype in pair)
                cuda.add_noise(x, name, regions, seeds, coefficients, out)
                cuda.add_noise(x[1:], name, regions, seeds, coefficients, out[1:])
            for shape, rank, regions in LOW_RANK:
                x, out = (allocate(regions, dtype) for dtype in pair)
                kind = LowRank(shape, rank)
                cuda.add_low_rank_noise(x, name, regions, seeds, coefficients, out, kind)
    assert len(device.kernels) == 1 + 2 * len(pairs), device.kernels.keys()
    assert not any(metadata.enable_fp_fusion for metadata in device.kernels.values())
    for kernel in (cuda._add, cuda._gaussian, cuda._add_products):
        for compiled in kernel.device_caches[0][0].values():
            assert compiled.asm["cubin"]
            print(compiled.asm["ptx"])


def allocate(regions: list[Region], dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(sum(region.numel for region in regions) + 1, dtype=dtype)


if __name__ == "__main__":
    torch.set_num_threads(1)  # on a busy machine, threads wait for each other
    if sys.argv[1] == "interpret":
        interpret()
        interpret_low_rank()
    else:
        pairs = [(torch.float32, torch.bfloat16)]
        launch(int(sys.argv[2]), ALL_PAIRS if "all" in sys.argv else pairs)
