"""Generates images: `bitdance sample`, without installation."""

from bitdance_jax.cli.main import start


if __name__ == "__main__":
    raise SystemExit(start("sample", "sample.py"))
