"""`python -m bitdance_jax.app`: the same as `bitdance app`."""

from bitdance_jax.cli.main import start


if __name__ == "__main__":
    raise SystemExit(start("app"))
