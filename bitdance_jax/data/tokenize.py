"""`python -m bitdance_jax.data.tokenize`: the same as `bitdance tokenize`."""

from bitdance_jax.cli.main import start


if __name__ == "__main__":
    raise SystemExit(start("tokenize"))
