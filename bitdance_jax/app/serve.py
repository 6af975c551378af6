"""A web page that draws: `python -m bitdance_jax.app` with the embedded emoji model, `--checkpoint FOLDER` with any other.

Classes or a prompt go in; a gallery fills in while the patches are drawn. The page needs Gradio (the extra `app`) and no internet.
"""

import os
import socket
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from bitdance_jax.app.page import STYLE, make_page
from bitdance_jax.app.page_guard import Guard, bypass_proxy, own_names
from bitdance_jax.cli.command_line import keep_compiled
from bitdance_jax.cli.flags import parse
from bitdance_jax.config.plain import Config, PathName, Range
from bitdance_jax.errors import UserError
from bitdance_jax.io.model_lookup import EMBEDDED
from bitdance_jax.pipelines.load import load
from bitdance_jax.pipelines.weights import WeightType


@dataclass(frozen=True)
class Arguments(Config):
    """Serves a web page that draws images.

    Attributes:
      checkpoint: class-conditional or text-to-image model folder, local or gs://; "emoji" is the small model that comes with the package.
      host: address to listen at; 0.0.0.0 lets other machines in.
      port: of that address.
      share: also a public address for 72 hours, through Gradio's servers.
      names: further names that this page is reached by, of a proxy in front of it, say; requests under others are refused.
      dtype: of weights and activations; float32 if left out, but for prompts on accelerators bfloat16.
      weights: the type that a text-to-image model's weights are kept in, `dtype` if left out.
      compilation_cache: folder, local or gs://, where compiled programs are kept: the first images come sooner the next time.
    """

    checkpoint: PathName = EMBEDDED
    host: str = "127.0.0.1"
    port: Annotated[int, Range(1, 2**16 - 1)] = 7860
    share: bool = False
    names: tuple[str, ...] = ()
    dtype: Literal["float32", "bfloat16"] | None = None
    weights: WeightType | None = None
    compilation_cache: PathName | None = None


def main() -> None:
    arguments = parse(Arguments)
    check_address(arguments.host, arguments.port)
    gradio = import_gradio()
    if arguments.compilation_cache is not None:
        keep_compiled(arguments.compilation_cache)
    model = load(arguments.checkpoint, dtype=arguments.dtype, weights=arguments.weights)
    page = make_page(gradio, model, model.name)
    start_server(page, arguments)
    page.block_thread()


def check_address(host: str, port: int) -> None:
    """Looks whether the page can be served there, before a model is loaded.

    Raises:
      UserError: no: the host is none of this machine's, or the port is taken.
    """
    try:
        if not host:
            raise OSError(None, "the host is empty; 0.0.0.0 is all of this machine's addresses")
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
    except (OSError, UnicodeError) as error:  # of names that no host can have
        reason = getattr(error, "strerror", None) or error
        line = f"cannot serve at {host}:{port}: {reason}; give another --host or --port"
        raise UserError(line) from error


def start_server(page: Any, arguments: Arguments) -> None:
    """Serves the page in threads, and prints its address (Gradio prints the public one).

    Raises:
      UserError: nothing can be served at that address.
    """
    bypass_proxy(arguments.host)
    guard = (Guard, (), {"names": own_names(arguments.host, arguments.names, arguments.share)})
    try:
        _, address, _ = page.launch(
            server_name=arguments.host,
            server_port=arguments.port,
            share=arguments.share,
            ssr_mode=False,
            css=STYLE,
            app_kwargs={"middleware": [guard]},
            prevent_thread_lock=True,
            quiet=True,  # what it says of its own options is no help with ours
        )
    except OSError as error:  # Gradio's, of a port that is taken, has several lines
        raise UserError(
            f"cannot serve at {arguments.host}:{arguments.port}: {str(error).splitlines()[0]}"
        ) from None
    print(f"the page is at {address} until Ctrl-C", flush=True)


def import_gradio() -> Any:
    """Gradio, told to keep to itself."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("GRADIO_RUN_HISTORY", "False")
    try:
        import gradio
    except ModuleNotFoundError:
        raise UserError('the web page needs Gradio: pip install "bitdance_jax[app]"') from None
    return gradio
