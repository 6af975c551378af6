"""A type checker accepts the Python examples of the documentation."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/sampling.md", "docs/text_to_image.md")
USES = """
import bitdance_jax
from bitdance_jax import MeshConfig, Pipeline, TextToImage, Tokenizer

model: Pipeline = bitdance_jax.load("emoji", mesh=MeshConfig(data=-1))
height: int = model.sample("Flags", size=(64, 64)).shape[1]
for image in model.sample(["Flags", 3], seed=[1, 2], output="pil"):
    image.save("x.png")
one = TextToImage.load("models/14b_64x").generate("a cat", images_per_input=2)[0]
tokenizer: Tokenizer = model.tokenizer
"""
MISUSES = """
import bitdance_jax

bitdance_jax.load().sample("Flags", output="jpeg")
"""


@pytest.mark.slow(15)
def test_examples(tmp_path):
    """In one run of the type checker, which finds nothing but the misuse."""
    pytest.importorskip("mypy")
    codes = {"uses": USES, "misuses": MISUSES}
    for page in PAGES:
        text = (ROOT / page).read_text()
        code = "\n".join(re.findall(r"^ *```python\n(.*?)^ *```$", text, re.S | re.M))
        assert "import bitdance_jax" in code
        codes[Path(page).stem.lower()] = code
    for name, code in codes.items():
        (tmp_path / f"{name}.py").write_text(code)
    files = [str(tmp_path / f"{name}.py") for name in codes]
    config = ["--config-file", str(ROOT / "pyproject.toml")]
    result = subprocess.run(
        [sys.executable, "-m", "mypy", *config, *files], capture_output=True, text=True, cwd=ROOT
    )
    errors = [line for line in result.stdout.splitlines() if ": error: " in line]
    assert len(errors) == 1 and "misuses.py" in errors[0], result.stdout + result.stderr
