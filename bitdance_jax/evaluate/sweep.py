"""`python -m bitdance_jax.evaluate.sweep`: the same as `bitdance sweep`."""

from bitdance_jax.cli.main import start


if __name__ == "__main__":
    raise SystemExit(start("sweep"))
