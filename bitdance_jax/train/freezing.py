"""Parameters that a run does not train, chosen by their paths."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from flax import traverse_util

from bitdance_jax.config.plain import require
from bitdance_jax.train.task import Params


def split(params: Params, patterns: Sequence[str]) -> tuple[Params, Params]:
    """The parameters that train, and those that are frozen.

    Args:
      params: nested dicts.
      patterns: paths such as "text/embed_tokens", or the first parts of them; `*` is anything.
    """
    parts: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for path, value in traverse_util.flatten_dict(params, sep="/").items():
        parts[any(_matches(path, pattern) for pattern in patterns)][path] = value
    trained, frozen = (traverse_util.unflatten_dict(part, sep="/") for part in parts)
    return trained, frozen


def merge(trained: Params, frozen: Params) -> Params:
    """Inverse of `split`."""
    if not frozen:
        return trained
    both = traverse_util.flatten_dict(trained) | traverse_util.flatten_dict(frozen)
    return traverse_util.unflatten_dict(both)


def check_patterns(params: Params, patterns: Sequence[str]) -> None:
    """Raises a ConfigError for a pattern that freezes nothing, or if all are frozen."""
    paths = list(traverse_util.flatten_dict(params, sep="/"))
    for pattern in patterns:
        require(
            any(_matches(path, pattern) for path in paths),
            f"freeze {pattern} is no part of the model; its parts are {', '.join(params)}, and in "
            f"them {', '.join(paths[:3])}, ...",
            "freeze",
        )
    require(
        bool(split(params, patterns)[0]),
        f"freeze {' '.join(patterns)} leaves nothing to train",
        "freeze",
    )


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}/*")


def flat(tree: dict[str, Any], separator: str) -> dict[str, Any]:
    """A nested dict as one, its paths joined."""
    return traverse_util.flatten_dict(tree, sep=separator)
