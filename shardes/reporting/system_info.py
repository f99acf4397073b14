"""Versions, host, devices and environment variables of a run, with secrets hidden."""

import os
import platform
import re
import socket
from importlib import metadata
from typing import Any

from shardes import __version__

PACKAGES = [
    "torch", "deepspeed", "transformers", "accelerate", "tokenizers", "safetensors",
    "huggingface_hub", "numpy", "numba", "triton", "omegaconf", "tensorboard", "wandb",
]  # fmt: skip
RELEVANT = re.compile(
    r"(SHARDES|WANDB|HF|HUGGINGFACE|TRANSFORMERS|TOKENIZERS|CUDA|NVIDIA|NCCL|GLOO|TORCH|PYTORCH|DS|"
    r"DEEPSPEED|OMP|MKL|NUMBA|TRITON|SLURM|MASTER|LOCAL)_|"
    r"(RANK|WORLD_SIZE|PYTHONPATH|LD_LIBRARY_PATH|VIRTUAL_ENV|CONDA_PREFIX)$"
)
SECRET = re.compile(r"TOKEN(?!IZERS)|KEY|SECRET|PASS|CREDENTIAL|AUTH|JWT")


def system_info() -> dict[str, Any]:
    """The facts that a bug report needs, ready for JSON."""
    import torch

    return {
        "versions": {"shardes": __version__, "python": platform.python_version(), **_versions()},
        "cuda": torch.version.cuda,
        "devices": _devices(),
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "environment": variables(os.environ),
    }


def _devices() -> list[str]:
    """The names of the accelerators that this process sees."""
    import torch

    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type == "mps":
        return []
    module = torch.get_device_module(accelerator)
    return [module.get_device_name(i) for i in range(torch.accelerator.device_count())]


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def variables(environ: dict[str, str] | os._Environ) -> dict[str, str]:
    """The environment variables that may affect a run; possible secrets are hidden."""
    return {
        name: "(hidden)" if SECRET.search(name) else re.sub(r"(?<=//)[^/@\s]+@", "(hidden)@", value)
        for name, value in sorted(environ.items())
        if RELEVANT.match(name)
    }
