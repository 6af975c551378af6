"""Which parameters a run does not train."""

import pytest

from bitdance_jax.errors import ConfigError
from bitdance_jax.train import freezing


PARAMS = {"text": {"layers": {"mlp": 1, "norm": 2}, "norm": 3}, "head": {"fc": 4}}


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        ((), {}),
        (("text",), {"text": PARAMS["text"]}),
        (("text/*/norm", "head/fc"), {"text": {"layers": {"norm": 2}}, "head": {"fc": 4}}),
    ],
)
def test_paths_or_their_first_parts(patterns, frozen):
    trained, rest = freezing.split(PARAMS, patterns)
    assert rest == frozen
    assert freezing.merge(trained, rest) == PARAMS


def test_a_name_that_is_none_and_everything():
    with pytest.raises(ConfigError, match="freeze tex is no part of the model; its parts are text"):
        freezing.check_patterns(PARAMS, ("tex",))
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        freezing.check_patterns(PARAMS, ("text", "head"))
