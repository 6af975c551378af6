"""`python -m bitdance_jax.plan`: the same as `bitdance plan`."""

from bitdance_jax.cli.main import start


if __name__ == "__main__":
    raise SystemExit(start("plan"))
