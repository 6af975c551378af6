"""`python -m bitdance_jax`: the same as `bitdance`."""

from bitdance_jax.cli.main import main


if __name__ == "__main__":
    raise SystemExit(main())
