"""`bitdance app`: serves a web page that generates images.

    bitdance app
    bitdance app --checkpoint MODEL

The visitor chooses classes or writes a prompt, and the gallery shows the patches as they are
generated. The page needs Gradio (the extra `app`), but no internet.
"""

import os
from dataclasses import dataclass
from typing import Any

from bitdance_jax.app.page import STYLE, make_page
from bitdance_jax.app.page_guard import Guard, bypass_proxy, own_names
from bitdance_jax.app.server import Port, ServerArguments, check_address
from bitdance_jax.cli.compilation_cache import keep_compiled
from bitdance_jax.cli.flags import parse
from bitdance_jax.errors import ConfigError, UserError
from bitdance_jax.pipelines.load import load


@dataclass(frozen=True)
class Arguments(ServerArguments):
    """Serves a web page that generates images.

    Attributes:
      share: also a public address for 72 hours, through Gradio's servers.
    """

    port: Port = 7860
    share: bool = False


def main() -> None:
    arguments = parse(Arguments)
    check_address(arguments.host, arguments.port)
    gradio = import_gradio()
    keep_compiled(arguments.compilation_cache)
    model = load(arguments.checkpoint, dtype=arguments.dtype, weights=arguments.weights)
    page = make_page(gradio, model, model.name)
    start_server(page, arguments)
    page.block_thread()


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
