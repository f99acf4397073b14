"""Copies configs/ and examples/ into the wheel's package, for `shardes configs` and `shardes init`.

All else is in pyproject.toml.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

KINDS = (".yaml", ".py", ".jsonl", ".ipynb")


class BuildWithConfigs(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # an editable install finds them in the checkout
            return
        for folder in ("configs", "examples"):
            for file in sorted(Path(folder).rglob("*")):
                if file.suffix in KINDS:
                    copy = Path(self.build_lib, "shardes", file)
                    self.mkpath(str(copy.parent))
                    self.copy_file(str(file), str(copy))


setup(cmdclass={"build_py": BuildWithConfigs})
