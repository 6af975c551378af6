"""The benchmark of the loader, with little data."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from bitdance_jax.errors import ConfigError


spec = importlib.util.spec_from_file_location(
    "loader_benchmark", Path(__file__).parents[2] / "benchmarks" / "loader.py"
)
loader = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loader)

SOURCES = [
    source
    for source in loader.SOURCES
    if source != "tfds" or importlib.util.find_spec("tensorflow_datasets")
]


def test_every_source(monkeypatch, capsys):
    monkeypatch.setattr(loader, "TOKENS", 64)
    flags = "--image-size 32 --batch-size 4 --images 8 --seconds 0.05 --repeats 1 --workers 0"
    flags = [*flags.split(), "--sources", *SOURCES]
    monkeypatch.setattr(sys, "argv", ["loader.py", *flags])
    loader.main()
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == SOURCES
    assert all(
        re.fullmatch(
            r"\w+ +0 workers +[1-9]\d* images/s +\d+\.\d\d ms of this process an image", line
        )
        for line in lines
    )


@pytest.mark.parametrize(("field", "value"), [("sources", ("web",)), ("seconds", 0)])
def test_bad_arguments(field, value):
    with pytest.raises(ConfigError, match=field) as error:
        loader.Arguments(**{field: value})
    assert error.value.field == field
