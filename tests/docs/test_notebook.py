"""The notebook runs from the first cell to the last, on a shorter training run."""

import json
import re
from pathlib import Path

import pytest
import quick_examples


NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"


def cells() -> list[dict]:
    return [
        cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]


def test_outputs_are_stripped():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells())


@pytest.mark.slow(60)
def test_notebook_runs(tmp_path, monkeypatch, few_emoji):
    """With few images, small models and batches, and 2 steps of training and of the head."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [])  # it sets its own
    quick_examples.make_quick(monkeypatch, tmp_path)
    code = "\n".join("".join(cell["source"]) for cell in cells())
    for line, quick, times in (
        (r"^( *)%pip .*$", r"\1raise AssertionError('nothing to install')", 1),
        (r"^STEPS = .*$", "STEPS = 2", 1),
        (r"--data\.batch-size 32", "--data.batch-size 8 --preview.head-steps 2", 1),
        (r"head_steps=25", "head_steps=2", 2),
    ):
        code, changed = re.subn(line, quick, code, flags=re.MULTILINE)
        assert changed == times
    exec(compile(code, NOTEBOOK, "exec"), {})
    assert (tmp_path / "runs" / "quickstart" / "model" / "config.json").exists()
