"""`python -m bitdance_jax.convert`: the same as `bitdance convert`."""

from bitdance_jax.cli.main import start


if __name__ == "__main__":
    raise SystemExit(start("convert"))
