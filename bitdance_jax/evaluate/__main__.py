"""`python -m bitdance_jax.evaluate`: the same as `bitdance evaluate`."""

from bitdance_jax.cli.main import start


if __name__ == "__main__":
    raise SystemExit(start("evaluate"))
