"""A type checker accepts the documentation's Python examples, page by page."""

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


def check(tmp_path: Path, code: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("mypy")
    file = tmp_path / "example.py"
    file.write_text(code)
    config = ["--config-file", str(ROOT / "pyproject.toml")]
    return subprocess.run(
        [sys.executable, "-m", "mypy", *config, str(file)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.slow
def test_examples(tmp_path):
    for page in PAGES:
        code = "\n".join(
            re.findall(r"^ *```python\n(.*?)^ *```$", (ROOT / page).read_text(), re.S | re.M)
        )
        result = check(tmp_path, code)
        assert "import bitdance_jax" in code and result.returncode == 0, f"{page}: {result.stdout}"
    result = check(tmp_path, USES)
    assert result.returncode == 0, result.stdout
    assert check(tmp_path, MISUSES).returncode == 1
