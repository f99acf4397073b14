"""The Triton kernel, interpreted and compiled, without a GPU."""

import re
import sys

import pytest

from launch import run

pytest.importorskip("triton", reason="triton is not installed")
WORKER = [sys.executable, "tests/workers/triton_noise.py"]


def test_the_interpreted_kernel_equals_the_reference_to_the_bit():
    done = run([*WORKER, "interpret"], seconds=200)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_gpus_without_fused_multiply_add(capability):
    done = run([*WORKER, "compile", str(capability)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f".target sm_{capability}") == 3  # full and low-rank noise, factors
    assert len(re.findall(r"mul(\.rn)?\.f32", done.stdout)) >= 2
    assert not re.search(r"fma\.rn\.(ftz\.)?f32", done.stdout)
