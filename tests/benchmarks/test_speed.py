"""The benchmarks of sampling on toy models: a row for each batch size, and a file of results."""

import json
import sys

import pytest
from benchmark_files import benchmark


@pytest.mark.slow(10)
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("sampler", []),
        ("text_to_image", ["--size", "256x256", "--weights", "int8", "--dtype", "float32"]),
    ],
)
def test_a_sweep(name, flags, monkeypatch, tmp_path, capsys):
    out = tmp_path / "results.json"
    common = ["--trial", "--batch", "1", "--head-steps", "2", "--runs", "1"]
    monkeypatch.setattr(sys, "argv", [name, *common, *flags, "--json", str(out)])
    with benchmark(name) as module:
        module.main()
    results = json.loads(out.read_text())["results"]
    assert [result["batch"] for result in results] == [1]
    assert all(result["roofline_share"] > 0 for result in results)
    assert sum(line.startswith("| ") for line in capsys.readouterr().out.splitlines()) == 2
