"""Which requests the web page's server answers."""

import asyncio
import urllib.request

import pytest

from bitdance_jax.app.page_guard import BODY_BYTES, Guard, bypass_proxy, own_names


JSON = {"content-type": "application/json; charset=utf-8", "content-length": "100"}


def status(
    method: str = "GET", kind: str = "http", names: tuple[str, ...] = (), **headers: str
) -> int:
    """Of the answer; 200 if the page itself gives it."""
    sent = []

    async def page(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})

    async def send(message):
        sent.append(message)

    fields = {"host": "127.0.0.1:7860"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    scope = {
        "type": kind,
        "method": method,
        "headers": [(n.encode(), v.encode("latin-1")) for n, v in fields.items()],
    }
    asyncio.run(Guard(page, names)(scope, None, send))
    return sent[0].get("status") or sent[0]["code"]


@pytest.mark.parametrize(
    "host",
    [
        "localhost:7860",
        "127.0.0.1",
        "192.168.0.7:7860",
        "[::1]:7860",
        "Page.example.com",
        "a1.gradio.live",
    ],
)
def test_own_hosts(host):
    assert status(host=host, names=("page.example.com", ".gradio.live")) == 200
    assert (
        status(
            "POST",
            host=host,
            origin=f"http://{host}",
            names=("page.example.com", ".gradio.live"),
            **JSON,
        )
        == 200
    )


@pytest.mark.parametrize(
    "host",
    [
        "evil.example.com:7860",
        "localhost.evil.com",
        "127.0.0.1.nip.io",
        "gradio.live",
        "",
        "[",
        "page.example.com.",
        "ü",
    ],
)
def test_other_hosts(host):
    assert status(host=host, names=("page.example.com", ".gradio.live")) == 403


@pytest.mark.parametrize(
    "origin", ["http://evil.example.com", "http://6.6.6.6", "null", "", "http://[", "file://"]
)
def test_other_origins(origin):
    assert status("POST", origin=origin, **JSON) == 403
    assert status(kind="websocket", origin=origin) == 1008


def test_behind_a_proxy_of_its_own():
    assert status(origin="https://page.example.com", names=("page.example.com",)) == 200


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"content-length": "0"}, 200),
        ({"content-type": "multipart/form-data; boundary=a", "content-length": "100"}, 415),
        ({"content-type": "text/plain", "content-length": "100"}, 415),
        ({"content-type": "application/json", "content-length": str(BODY_BYTES + 1)}, 413),
        ({"content-type": "application/json", "content-length": "many"}, 411),
        ({"content-type": "application/json", "transfer-encoding": "chunked"}, 411),
    ],
)
def test_bodies(headers, expected):
    assert status("POST", **headers) == status("PUT", **headers) == expected


def test_names():
    assert {"0.0.0.0", "page.example.com"} <= own_names("0.0.0.0", ("page.example.com",), False)
    assert ".gradio.live" in own_names("127.0.0.1", (), True) - own_names("127.0.0.1", (), False)


def test_proxies_are_not_asked_for_the_page_itself(monkeypatch):
    for name in ("http_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "inside.example.com")
    monkeypatch.setenv("no_proxy", "")
    bypass_proxy("10.0.0.5")
    own, inside, outside = (
        ("127.0.0.1", "localhost", "10.0.0.5"),
        "inside.example.com",
        "a.example.org",
    )
    assert [
        host for host in (*own, inside, outside) if urllib.request.proxy_bypass_environment(host)
    ] == [*own, inside]
