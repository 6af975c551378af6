"""What the servers of the web page and of the HTTP API share."""

import socket
from dataclasses import dataclass
from typing import Annotated, Literal

from bitdance_jax.config.plain import Config, PathName, Range
from bitdance_jax.errors import ConfigError
from bitdance_jax.io.model_lookup import EMBEDDED
from bitdance_jax.pipelines.weights import WeightType


Port = Annotated[int, Range(1, 2**16 - 1)]


@dataclass(frozen=True)
class ServerArguments(Config):
    """A model, and the address that it is served at.

    Attributes:
      checkpoint: class-conditional or text-to-image model folder, local or gs://, or a Hugging Face
        id; "emoji" and "emoji_classes" are the small models of the package.
      host: address to listen at; 0.0.0.0 accepts other machines.
      port: of that address.
      names: further host names of the server, for example of a proxy in front of it; requests under
        other names are refused.
      dtype: of weights and activations; default: float32, for prompts on accelerators bfloat16.
      weights: the type of a text-to-image model's weights in memory; default: `dtype`.
      compilation_cache: folder, local or gs://, for compiled programs, which makes the first images
        after the next start faster; default: a folder in the user's cache.
    """

    checkpoint: PathName = EMBEDDED
    host: str = "127.0.0.1"
    port: Port = 8000
    names: tuple[str, ...] = ()
    dtype: Literal["float32", "bfloat16"] | None = None
    weights: WeightType | None = None
    compilation_cache: PathName | None = None


def check_address(host: str, port: int) -> None:
    """Checks, before a model is loaded, that a server can listen at an address.

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
