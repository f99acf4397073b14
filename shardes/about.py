"""Where and with what a run happens: versions, host, devices, environment variables; no secrets."""

import os
import platform
import re
import socket
from importlib import metadata
from typing import Any

import torch

from shardes import __version__

PACKAGES = [
    "torch", "deepspeed", "transformers", "accelerate", "tokenizers", "safetensors", "huggingface_hub", "numpy",
    "numba", "triton", "omegaconf", "tensorboard", "wandb",
]  # fmt: skip
RELEVANT = re.compile(
    r"(SHARDES|WANDB|HF|HUGGINGFACE|TRANSFORMERS|TOKENIZERS|CUDA|NVIDIA|NCCL|GLOO|TORCH|PYTORCH|DS|DEEPSPEED|OMP|MKL|"
    r"NUMBA|TRITON|SLURM|MASTER|LOCAL)_|(RANK|WORLD_SIZE|PYTHONPATH|LD_LIBRARY_PATH|VIRTUAL_ENV|CONDA_PREFIX)$"
)
SECRET = re.compile(r"TOKEN(?!IZERS)|KEY|SECRET|PASS|CREDENTIAL|AUTH|JWT")


def about() -> dict[str, Any]:
    """What a report of a bug needs, as JSON has it."""
    return {
        "versions": {"shardes": __version__, "python": platform.python_version(), **_versions()},
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "environment": variables(os.environ),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def variables(environ: dict[str, str] | os._Environ) -> dict[str, str]:
    """The environment variables that a run may depend on; what may be a secret is hidden."""
    return {
        name: "(hidden)" if SECRET.search(name) else re.sub(r"(?<=//)[^/@\s]+@", "(hidden)@", value)
        for name, value in sorted(environ.items())
        if RELEVANT.match(name)
    }
