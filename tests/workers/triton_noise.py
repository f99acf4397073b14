"""The Triton kernel without a GPU: triton_noise.py interpret | compile CAPABILITY"""

import os
import sys

if sys.argv[1] == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

from shardes.noise import cuda, reference
from shardes.noise.definition import LANES, ROUNDS
from shardes.noise.low_rank import LowRank
from shardes.sharding.regions import Region

LAYOUTS = [
    [Region.contiguous(5, 1)],
    [Region.contiguous(3, 3001)],
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


def compile_for(capability: int) -> None:
    """Print the PTX of the kernels for float32 in, bfloat16 out."""
    sizes = dict(LANES=LANES, ROUNDS=ROUNDS, COUNTERS=cuda.COUNTERS)
    tile = dict(TILE_ROWS=cuda.TILE_ROWS, TILE_COLS=cuda.TILE_COLS)
    compile_kernel(cuda._add, sizes, capability)
    compile_kernel(cuda._gaussian, sizes, capability)
    compile_kernel(cuda._add_products, tile, capability)


def compile_kernel(kernel, constants: dict[str, int], capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = dict(
        x="*fp32", out="*bf16", seeds="*i64", coefficients="*fp32", table="*fp32", terms="i32"
    )
    kinds |= {"a": "*fp32", "b": "*fp32", "stretches": "i32", "rank": "i32"}
    kinds = dict.fromkeys(kernel.arg_names, "i64") | kinds
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {name: kinds[name] for name in kernel.arg_names}
    source = ASTSource(
        kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=cuda.OPTIONS)
    assert made.asm["cubin"]
    print(made.asm["ptx"])


if __name__ == "__main__":
    torch.set_num_threads(1)  # on a busy machine, threads wait for each other
    if sys.argv[1] == "interpret":
        interpret()
        interpret_low_rank()
    else:
        compile_for(int(sys.argv[2]))
