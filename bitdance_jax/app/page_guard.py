"""What the web page's server lets in, and how it is reached where the environment names a proxy."""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import urlsplit


Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

BODY_BYTES = 2**20
"""More than any request of the page has."""


class Guard:
    """ASGI middleware: requests for this host only, from its own pages or from no page at all, and no uploads.

    Another site's page cannot make a visitor's browser draw, nor read the images after it has pointed its own name to this address (DNS
    rebinding): such requests bear that site's name in Origin or Host.
    """

    def __init__(
        self, app: Callable[[Scope, Receive, Send], Awaitable[None]], names: Collection[str] = ()
    ) -> None:
        """`names`: the host's, besides "localhost" and IP addresses; one that begins with a dot stands for all that end in it."""
        self._app = app
        self._names = {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, text = refusal
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": f"{text}\n".encode()})

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason, None for a request that may pass."""
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        host = headers.get("host", "")
        if not self._is_own(host):
            return (
                403,
                f"this page is not reached as {host!r}; start it with --names NAME if it is one of its own",
            )
        origin = headers["origin"].partition("://")[2] if "origin" in headers else host
        if origin.lower() != host.lower() and not self._is_named(origin):
            return 403, "another site's page asks for this"
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            return _refusal_of_body(headers)
        return None

    def _is_own(self, address: str) -> bool:
        """No site's name is an IP address."""
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(_host(address))
            return True
        return self._is_named(address)

    def _is_named(self, address: str) -> bool:
        host = _host(address)
        return host in self._names or any(
            host.endswith(name) for name in self._names if name.startswith(".")
        )


def _host(address: str) -> str:
    """Of host:port; "" where it is neither."""
    with contextlib.suppress(ValueError):
        return (urlsplit(f"//{address}").hostname or "").lower()
    return ""


def _refusal_of_body(headers: dict[str, str]) -> tuple[int, str] | None:
    """The page sends small JSON of a known length, or nothing; an upload is a form."""
    length = headers.get("content-length", "0")
    if "transfer-encoding" in headers or not length.isdecimal():
        return 411, "the length of the request must be said"
    if int(length) > BODY_BYTES:
        return 413, f"a request has at most {BODY_BYTES:,} bytes"
    if (
        int(length)
        and headers.get("content-type", "").split(";")[0].strip().lower() != "application/json"
    ):
        return 415, "this page takes JSON, and no uploads"
    return None


def own_names(host: str, names: Collection[str], share: bool) -> set[str]:
    """Those that the page at `host` is known by."""
    return {host, socket.gethostname(), *names, *([".gradio.live"] if share else [])}


def bypass_proxy(host: str) -> None:
    """Gradio asks its own server whether it has started, by way of http_proxy where that is set."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = ",".join(filter(None, (given, "localhost", "127.0.0.1", "::1", host)))
