"""Trains a model: `bitdance train`, without installation."""

from bitdance_jax.cli.main import start


if __name__ == "__main__":
    raise SystemExit(start("train", "train.py"))
