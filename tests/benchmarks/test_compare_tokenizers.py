"""benchmarks/compare_tokenizers.py on two toy tokenizers: the files that it writes."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tiny_models
from PIL import Image

from bitdance_jax.config import to_dict
from bitdance_jax.evaluate.psnr import psnr
from bitdance_jax.io import model_folder


def test_a_table_and_a_figure(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location(
        "compare_tokenizers", Path(__file__).parents[2] / "benchmarks" / "compare_tokenizers.py"
    )
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, benchmark)
    spec.loader.exec_module(benchmark)
    # The mean difference of colours in place of a network.
    monkeypatch.setattr(benchmark, "load_efficientnet", lambda path: {})
    distance = lambda params, a, b: abs(a - b).mean((1, 2, 3))  # noqa: E731
    monkeypatch.setattr(benchmark.efficientnet, "distance", distance)

    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    (tmp_path / "images").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "images" / f"{number:02}.png")
    params = tiny_models.tokenizer_params()
    grey_params = dict(params) | {"decoder": jax.tree.map(jnp.zeros_like, params["decoder"])}
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    for folder, weights in zip(folders, (params, grey_params), strict=True):
        config = to_dict(tiny_models.TOKENIZER)
        model_folder.save(folder, kind="tokenizer", config=config, params=weights, metadata={})
    flags = ["--models", *folders, "--names", "toy", "grey", "--data", str(tmp_path / "images")]
    flags += ["--image-size", "16", "--out", str(tmp_path / "out"), "--columns", "2"]
    monkeypatch.setattr(sys, "argv", ["compare_tokenizers.py", *flags])
    benchmark.main()

    held_out = images[[18, 37]]
    rows = json.loads((tmp_path / "out" / "tokenizers.json").read_text())
    assert [row["name"] for row in rows] == ["toy", "grey"]
    grey = np.full_like(held_out, 128)  # the decoder's zero
    assert abs(rows[1]["psnr"] - psnr(grey, held_out).mean()) < 1e-3
    expected = abs(grey / 127.5 - held_out / 127.5).mean()
    assert abs(rows[1]["lite0_distance"] - expected) < 1e-4
    assert rows[0]["bits_per_pixel"] == 2 and rows[0]["psnr"] != rows[1]["psnr"]
    assert "Means over 2 held-out images." in capsys.readouterr().out
    figure = np.asarray(Image.open(tmp_path / "out" / "tokenizers.png"))
    assert figure.shape[0] == 3 * (16 + 4)
