"""`bitdance serve`: an HTTP API that generates images, for OpenAI's clients.

    bitdance serve
    bitdance serve --checkpoint MODEL --api-key-file KEY

`docs/api_server.md` describes the API. It needs Starlette and Uvicorn (the extra `api`).
"""

import contextlib
import os
from dataclasses import dataclass
from typing import Annotated, Any

from bitdance_jax.app.page_guard import Guard, own_names
from bitdance_jax.app.page_inputs import MAX_IMAGES
from bitdance_jax.app.server import ServerArguments, check_address
from bitdance_jax.cli.compilation_cache import keep_compiled
from bitdance_jax.cli.flags import parse
from bitdance_jax.config.plain import Count, HeadSteps, PathName, Range
from bitdance_jax.errors import FileError, UserError
from bitdance_jax.io.readers import read_text
from bitdance_jax.pipelines.load import load


KEY_VARIABLE = "BITDANCE_API_KEY"


@dataclass(frozen=True)
class Arguments(ServerArguments):
    """Serves an HTTP API that generates images, for OpenAI's clients.

    Attributes:
      api_key_file: a file with the key that requests must send; default: the key in the environment
        variable BITDANCE_API_KEY, or none.
      queue: requests that wait while one is sampled; further ones are refused.
      max_images: of a request.
      max_pixels: of an image.
      max_steps: of the head's solver.
    """

    api_key_file: PathName | None = None
    queue: Annotated[int, Range(0, 10_000)] = 8
    max_images: Annotated[int, Range(1, MAX_IMAGES)] = 10
    max_pixels: Count = 2**20
    max_steps: HeadSteps = 200


def main() -> None:
    arguments = parse(Arguments)
    check_address(arguments.host, arguments.port)
    key = read_key(arguments.api_key_file)
    uvicorn = import_uvicorn()
    from bitdance_jax.app.api import Limits, make_api  # needs Starlette
    from bitdance_jax.app.api_errors import refusal

    keep_compiled(arguments.compilation_cache)
    model = load(arguments.checkpoint, dtype=arguments.dtype, weights=arguments.weights)
    limits = Limits(
        queue=arguments.queue,
        images=arguments.max_images,
        pixels=arguments.max_pixels,
        head_steps=arguments.max_steps,
    )
    names = own_names(arguments.host, arguments.names, share=False)
    app = Guard(make_api(model, limits, key), names, refusal)
    address = f"http://{arguments.host}:{arguments.port}/v1"
    key_note = "the key" if key else "no key"
    print(f"the API is at {address} until Ctrl-C; requests need {key_note}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.run(
            app,
            host=arguments.host,
            port=arguments.port,
            log_level="warning",
            lifespan="off",
            timeout_graceful_shutdown=2,
        )


def read_key(path: str | None) -> str | None:
    """The key in a file, or that of the environment; None if there is none.

    Raises:
      FileError: the file cannot be read, or does not have one word of ASCII.
    """
    where = path or KEY_VARIABLE
    text = os.environ.get(KEY_VARIABLE) if path is None else read_text(path)
    if text is None:
        return None
    key = text.strip()
    if not key or not key.isascii() or len(key.split()) != 1:
        raise FileError(f"{where} must hold one key, of letters, digits and signs", path)
    return key


def import_uvicorn() -> Any:
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ModuleNotFoundError:
        raise UserError(
            'the API needs Starlette and Uvicorn: pip install "bitdance_jax[api]"'
        ) from None
    return uvicorn
