"""The command `bitdance`: runs one of its subcommands, and imports only that."""

import difflib
import importlib
import signal
import sys
from typing import NamedTuple

from bitdance_jax.version import __version__


class Command(NamedTuple):
    """A subcommand.

    Attributes:
      module: where its `main` is; only the subcommand that runs is imported.
      summary: one line of the help.
    """

    module: str
    summary: str


COMMANDS = {
    "sample": Command(
        "bitdance_jax.cli.sample", "generate images of labels or prompts: a PNG or an .npz"
    ),
    "describe": Command(
        "bitdance_jax.cli.describe", "answer a question about an image with a text-to-image model"
    ),
    "train": Command(
        "bitdance_jax.cli.train", "train a tokenizer or a model of labels or prompts from a config"
    ),
    "convert": Command(
        "bitdance_jax.cli.convert", "convert released weights to a model folder, or back"
    ),
    "evaluate": Command(
        "bitdance_jax.cli.evaluate", "compute FID and other scores of images or of a tokenizer"
    ),
    "evaluate-prompts": Command(
        "bitdance_jax.cli.prompts", "generate the images that a benchmark of prompts scores"
    ),
    "sweep": Command(
        "bitdance_jax.cli.sweep", "compare guidance scales and numbers of head steps by their score"
    ),
    "tokenize": Command(
        "bitdance_jax.cli.tokenize", "write the tokens of a dataset, for faster training"
    ),
    "plan": Command(
        "bitdance_jax.cli.plan", "estimate memory and speed on devices that need not be present"
    ),
    "app": Command("bitdance_jax.app.serve", "serve a web page that generates images"),
    "serve": Command(
        "bitdance_jax.app.api_server", "serve an HTTP API that generates images, as OpenAI's does"
    ),
    "toy-text-to-image": Command(
        "bitdance_jax.cli.toy_text_to_image", "write a small random text-to-image model for tests"
    ),
}

HELP = """usage: bitdance COMMAND ...

BitDance (arXiv 2602.14041): autoregressive image generation with binary tokens.

commands:
{commands}

`bitdance COMMAND --help` lists the flags of a command; `bitdance --version` prints the version."""


def main() -> int:
    """Runs `bitdance` with the command line of this process, and returns the exit status."""
    name, *flags = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
        print(HELP.format(commands="\n".join(lines)))
        return 0
    if name == "--version":
        print(f"bitdance {__version__}")
        return 0
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        print(f"error: unknown command {name!r}{hint} (--help lists them all)", file=sys.stderr)
        return 2
    sys.argv[1:] = flags
    return start(name)


def start(name: str, program: str | None = None) -> int:
    """Runs a subcommand with the flags in `sys.argv`, and returns the exit status.

    During the imports Ctrl-C ends the process without a traceback; then `command_line.run`
    handles it.

    Args:
      program: what the help calls the command; None: `bitdance NAME`.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.argv[0] = program or f"bitdance {name}"
    module = importlib.import_module(COMMANDS[name].module)
    from bitdance_jax.cli.command_line import run

    return run(module.main)
