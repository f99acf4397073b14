"""The Triton kernel, interpreted and compiled, without a GPU."""

import re
import sys

import pytest

from launch import run

pytest.importorskip("triton", reason="triton is not installed")
WORKER = [sys.executable, "tests/workers/triton_noise.py"]


@pytest.mark.slow
def test_the_interpreted_kernel_equals_the_reference_to_the_bit():
    done = run([*WORKER, "interpret"], seconds=200)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments, kernels",
    [
        pytest.param(["80"], 3, marks=pytest.mark.slow),
        (["90"], 3),  # full noise, factors and their products, from float32 to bfloat16
        pytest.param(["90", "all"], 19, marks=pytest.mark.slow),
    ],
)
def test_all_that_is_launched_compiles_for_gpus_without_fused_multiply_add(arguments, kernels):
    """Up to the launch all is real; a kernel serves every region, name and alignment."""
    done = run([*WORKER, "launch", *arguments])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f".target sm_{arguments[0]}") == kernels
    assert (
        len(re.findall(r"mul(\.rn)?\.f32", done.stdout)) >= kernels - 1
    )  # the factors' kernel multiplies nothing
    assert not re.search(r"(fma|mad)(\.r.)?(\.ftz)?\.f32|\.ftz", done.stdout)
