"""`python -m bitdance_jax.evaluate.prompts`: the same as `bitdance evaluate-prompts`."""

from bitdance_jax.cli.main import start


if __name__ == "__main__":
    raise SystemExit(start("evaluate-prompts"))
