"""The Triton kernel without a GPU: triton_noise.py interpret | compile CAPABILITY"""

import os
import sys

if sys.argv[1] == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

from shardes.noise import cuda, reference
from shardes.noise.definition import LANES, ROUNDS
from shardes.sharding.regions import Region

LAYOUTS = [
    [Region.contiguous(5, 1)],
    [Region.contiguous(3, 3001)],
    [Region(5, 37, 91, 1003), Region.contiguous(2**45 + 3, 5)],
    [Region(7, 20, 1, 9)],
    [],
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


def compile_for(capability: int) -> None:
    """Print the PTX of the kernel for float32 in, bfloat16 out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = dict(
        x="*fp32", out="*bf16", seeds="*i64", coefficients="*fp32", table="*fp32", terms="i32"
    )
    kinds |= dict.fromkeys(("start", "cols", "stride", "name_low", "name_high"), "i64") | {
        "stretches": "i32"
    }
    constants = dict(COUNTERS=cuda.COUNTERS, LANES=LANES, ROUNDS=ROUNDS)
    signature = {name: kinds.get(name, "constexpr") for name in cuda._add.arg_names}
    source = ASTSource(
        cuda._add, signature, {(cuda._add.arg_names.index(k),): v for k, v in constants.items()}
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=cuda.OPTIONS)
    assert made.asm["cubin"]
    print(made.asm["ptx"])


if __name__ == "__main__":
    interpret() if sys.argv[1] == "interpret" else compile_for(int(sys.argv[2]))
