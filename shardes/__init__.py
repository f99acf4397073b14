"""Evolution strategies for language models that are too large for one GPU (arXiv 2509.24372)."""

from typing import TYPE_CHECKING, Any

from shardes.errors import ConfigError, RunError

if TYPE_CHECKING:
    from shardes.api import Run, evaluate, load_run, plan, train

__version__ = "0.1.0"
__all__ = ["ConfigError", "Run", "RunError", "evaluate", "load_run", "plan", "train"]


def __getattr__(name: str) -> Any:
    """The functions of `shardes.api`, imported when they are first used."""
    if name not in __all__:
        raise AttributeError(f"module 'shardes' has no attribute {name!r}")
    from shardes import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
