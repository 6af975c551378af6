"""Which requests the servers accept, and how to reach the web page's behind a proxy."""

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
"""The largest body of a request; the page sends smaller ones."""


def plain_text(status: int, reason: str) -> tuple[str, str]:
    """The content type and the body of the answer to a refused request."""
    return "text/plain; charset=utf-8", f"{reason}\n"


class Guard:
    """ASGI middleware that accepts requests for this host from its own pages or none; no uploads.

    Another site's page cannot make a visitor's browser generate images, nor read them after it has
    pointed its own name to this address (DNS rebinding): such requests have that site's name in
    Origin or Host.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        names: Collection[str] = (),
        answer: Callable[[int, str], tuple[str, str]] = plain_text,
    ) -> None:
        """
        Args:
          app: the server.
          names: of the host, besides "localhost" and IP addresses; one that begins with a dot
            matches all names that end in it.
          answer: see `plain_text`.
        """
        self._app = app
        self._answer = answer
        self._names = {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            kind, body = self._answer(*refusal)
            headers = [(b"content-type", kind.encode()), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": refusal[0], "headers": headers})
            await send({"type": "http.response.body", "body": body.encode()})

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason of a refused request; None for an accepted one."""
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        host = headers.get("host", "")
        if not self._is_own(host):
            return (
                403,
                f"{host!r} is not a name of this server; start it with --names NAME to add one",
            )
        origin = headers["origin"].partition("://")[2] if "origin" in headers else host
        if origin.lower() != host.lower() and not self._is_named(origin):
            return 403, "another site's page asks for this"
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            return _refusal_of_body(headers)
        return None

    def _is_own(self, address: str) -> bool:
        """Whether it is an IP address, which no other site can claim, or a name of the host."""
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
    """The host of host:port; "" if it is malformed."""
    with contextlib.suppress(ValueError):
        return (urlsplit(f"//{address}").hostname or "").lower()
    return ""


def _refusal_of_body(headers: dict[str, str]) -> tuple[int, str] | None:
    """Status and reason for a body that is not small JSON of a known length; uploads are forms."""
    length = headers.get("content-length", "0")
    if "transfer-encoding" in headers or not length.isdecimal():
        return 411, "the length of the request is missing"
    if int(length) > BODY_BYTES:
        return 413, f"a request has at most {BODY_BYTES:,} bytes"
    if (
        int(length)
        and headers.get("content-type", "").split(";")[0].strip().lower() != "application/json"
    ):
        return 415, "only JSON is accepted (Content-Type: application/json), and no uploads"
    return None


def own_names(host: str, names: Collection[str], share: bool) -> set[str]:
    """The names of the page at `host`."""
    return {host, socket.gethostname(), *names, *([".gradio.live"] if share else [])}


def bypass_proxy(host: str) -> None:
    """Excludes the page from http_proxy: Gradio asks its own server whether it has started."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = ",".join(filter(None, (given, "localhost", "127.0.0.1", "::1", host)))
