"""Measurements; see README.md. Each module runs with `python -m benchmarks.NAME`."""

from shardes.distributed import environment

environment.prepare()
