"""`python -m bitdance_jax.toy_text_to_image`: the same as `bitdance toy-text-to-image`."""

from bitdance_jax.cli.main import start


if __name__ == "__main__":
    raise SystemExit(start("toy-text-to-image"))
