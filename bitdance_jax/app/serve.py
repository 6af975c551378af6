"""`bitdance app`: serves a web page that generates images.

    bitdance app
    bitdance app --checkpoint MODEL

The visitor chooses classes or writes a prompt, and the gallery shows the patches as they are
generated. The page needs Gradio (the extra `app`), but no internet.
"""

import os
import socket
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from bitdance_jax.app.page import STYLE, make_page
from bitdance_jax.app.page_guard import Guard, bypass_proxy, own_names
from bitdance_jax.cli.compilation_cache import keep_compiled
from bitdance_jax.cli.flags import parse
from bitdance_jax.config.plain import Config, PathName, Range
from bitdance_jax.errors import ConfigError, UserError
from bitdance_jax.io.model_lookup import EMBEDDED
from bitdance_jax.pipelines.load import load
from bitdance_jax.pipelines.weights import WeightType


@dataclass(frozen=True)
class Arguments(Config):
    """Serves a web page that generates images.

    Attributes:
      checkpoint: class-conditional or text-to-image model folder, local or gs://, or a Hugging Face
        id; "emoji" and "emoji_classes" are the small models of the package.
      host: address to listen at; 0.0.0.0 accepts other machines.
      port: of that address.
      share: also a public address for 72 hours, through Gradio's servers.
      names: further host names of the page, for example of a proxy in front of it; requests under
        other names are refused.
      dtype: of weights and activations; default: float32, for prompts on accelerators bfloat16.
      weights: the type of a text-to-image model's weights in memory; default: `dtype`.
      compilation_cache: folder, local or gs://, for compiled programs, which makes the first images
        after the next start faster; default: a folder in the user's cache.
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
    keep_compiled(arguments.compilation_cache)
    model = load(arguments.checkpoint, dtype=arguments.dtype, weights=arguments.weights)
    page = make_page(gradio, model, model.name)
    start_server(page, arguments)
    page.block_thread()


def check_address(host: str, port: int) -> None:
    """Checks, before a model is loaded, that the page can be served at an address.

    Raises:
      ConfigError: the host is not of this machine, or the port is in use.
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
    except (OSError, UnicodeError) as error:  # UnicodeError: of malformed host names
        reason = getattr(error, "strerror", None) or error
        line = f"cannot serve at {host}:{port}: {reason}; choose another host or port"
        raise ConfigError(line, "host") from error


def start_server(page: Any, arguments: Arguments) -> None:
    """Serves the page in threads, and prints its address (Gradio prints the public one).

    Raises:
      ConfigError: nothing can be served at that address.
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
            quiet=True,  # Its messages are about options of its own.
        )
    except OSError as error:
        reason = str(error).splitlines()[0]
        line = f"cannot serve at {arguments.host}:{arguments.port}: {reason}"
        raise ConfigError(line, "port") from None
    print(f"the page is at {address} until Ctrl-C", flush=True)


def import_gradio() -> Any:
    """Gradio, without its reports and its history of runs."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("GRADIO_RUN_HISTORY", "False")
    try:
        import gradio
    except ModuleNotFoundError:
        raise UserError('the web page needs Gradio: pip install "bitdance_jax[app]"') from None
    return gradio
