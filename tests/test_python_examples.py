"""The notebook and the example of docs/python.md run as they stand, here with a tiny model."""

import json
import re
import runpy
from pathlib import Path

import nbformat
import pytest

from launch import ROOT

MODEL = '"models/SmolLM2-135M-Instruct"'
NOTEBOOK = ROOT / "examples" / "notebook" / "few_words.ipynb"


def cells(kind: str) -> list[str]:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def run(code: str, smaller: dict[str, str], model: Path, directory: Path, monkeypatch) -> dict:
    """Run code as a script in a directory, with other texts in it; returns its global names."""
    for text, other in (smaller | {MODEL: repr(str(model))}).items():
        assert code.count(text) == 1
        code = code.replace(text, other)
    script = directory / "script.py"
    script.write_text(code)
    monkeypatch.chdir(directory)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(script))


def test_the_notebook_runs(uneven_llama, tmp_path, monkeypatch, capsys):
    code = "\n\n".join(cells("code"))
    smaller = {'"es.iterations": 10': '"es.iterations": 2', "samples=4": "samples=1"}
    names = run(code, smaller, uneven_llama, tmp_path, monkeypatch)
    assert len(names["curve"]) == len(names["result"].metrics) == 2
    assert "\n1 " in capsys.readouterr().out
    report = json.loads((tmp_path / "runs" / "notebook" / "evaluation.json").read_text())
    low, high = report["splits"]["test"]["difference"]["sampled"]["reward_interval"]
    assert low <= high


def test_the_notebook_has_no_output_and_names_what_there_is():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    for link in re.findall(r"\]\(([^)]+)\)", "\n".join(cells("markdown"))):
        assert (NOTEBOOK.parent / link).exists(), link


@pytest.mark.slow
def test_the_pages_example_runs(uneven_llama, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "python.md").read_text()
    code = re.search(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[1]
    smaller = {'"run.dir"': '"es.iterations": 2, "generation.max_new_tokens": 4, "run.dir"'}
    run(code, smaller, uneven_llama, tmp_path, monkeypatch)
    assert capsys.readouterr().out.rstrip().endswith("iteration_2")
