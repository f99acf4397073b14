"""Evolution strategies for language models that are too large for one GPU (arXiv 2509.24372)."""

__version__ = "0.1.0"
