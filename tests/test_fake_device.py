"""What lies on a GPU meets only what lies on a GPU: walked without one, on fake tensors.

Walked, on engine=fsdp with one rank: the center on the host and on the GPU, full and of low rank,
perturb, restore, update with every kind of decay, digests; es.restore=subtract; greedy
decoding with rows that leave, logits processors, log-probabilities, and members side by side.

What cannot be walked:
- engine=deepspeed: its accelerator is the CPU's where torch has no CUDA, and takes CPU tensors.
- Collectives, and so more ranks: fake tensors have no bytes to send, and FSDP needs CUDA's streams.
- Sampling: a generator of the GPU needs the GPU.
- Triton's kernels, which tests/noise/test_cuda.py interprets, and compiles up to the launch.
- Streams and pinned memory: copies are in the order in which they are written down.
- Reading files and Numba, which work on the host.
"""

import os
import sys

import pytest

from launch import ROOT, run


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_no_operation_mixes_devices(dtype, tied_llama):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    worker = [sys.executable, "tests/workers/fake_walk.py", str(tied_llama), dtype]
    done = run(worker, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("walked\n")
