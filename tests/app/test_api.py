"""The HTTP API: images, models, errors, the key, the queue, and clients that go away."""

import asyncio
import base64
import dataclasses
import io
import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from PIL import Image

from bitdance_jax import FileError, UserError
from bitdance_jax.app import api_server
from bitdance_jax.app.page_guard import Guard
from bitdance_jax.pipelines import toy_text_to_image
from bitdance_jax.pipelines.load import load


httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
from starlette.testclient import TestClient  # noqa: E402

from bitdance_jax.app import api  # noqa: E402
from bitdance_jax.app.api_errors import refusal  # noqa: E402


URL = "/v1/images/generations"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "prompts"
    toy_text_to_image.save(folder, tiny_models.TEXT_TO_IMAGE)
    return load(folder)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "classes"
    tiny_models.save_model(folder)
    return load(folder)


@pytest.fixture
def client(prompts):
    return TestClient(api.make_api(prompts, api.Limits(pixels=200)))


def images_of(answer) -> tuple[np.ndarray, list[dict[str, str]]]:
    files = [base64.b64decode(entry["b64_json"]) for entry in answer.json()["data"]]
    images = [Image.open(io.BytesIO(file), formats=["PNG"]) for file in files]
    return np.stack([np.asarray(image) for image in images]), [image.info for image in images]


def test_prompt(client, prompts):
    body = {
        "model": "prompts",
        "prompt": "a cat",
        "n": 2,
        "size": "12x8",
        "response_format": "b64_json",
        "user": "me",
        "quality": None,
        "seed": 5,
        "negative_prompt": "a dog",
        "guidance_scale": 2,
        "head_steps": 3,
    }
    answer = client.post(URL, json=body)
    assert answer.status_code == 200, answer.text
    images, texts = images_of(answer)
    assert images.shape == (2, 8, 12, 3)
    sampler = dataclasses.replace(prompts.sampler, head_steps=3, guidance_scale=2.0)
    options = {"images_per_input": 2, "size": "12x8", "negative_prompt": "a dog", "batch_size": 2}
    expected = prompts.sample("a cat", 5, sampler=sampler, progress=False, **options)
    np.testing.assert_array_equal(images, expected)
    assert texts[1].items() >= {"prompt": "a cat", "seed": "5", "index": "1"}.items()
    assert answer.json()["seed"] == 5 and answer.json()["size"] == "12x8"


def test_class_name_and_defaults(classes):
    client = TestClient(api.make_api(classes))
    name = classes.class_names[3]
    answer = client.post(URL, json={"prompt": name, "sampler": "fast", "head_steps": 2})
    assert answer.status_code == 200, answer.text
    sampler = dataclasses.replace(classes.sampler.named("fast"), head_steps=2)
    seed = answer.json()["seed"]
    images, texts = images_of(answer)
    np.testing.assert_array_equal(images, classes.sample(3, seed, sampler=sampler, progress=False))
    assert texts[0]["label"] == name
    for body in ({"prompt": "no such class"}, {"prompt": name, "size": "24x16"}):
        assert client.post(URL, json=body).status_code == 400
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "classes" and model["class_names"] == list(classes.class_names)


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"prompt": None}, None, "prompt: Expected str, got null"),
        ({"prompt": " "}, "prompt", "empty"),
        ({"prompt": "x" * 2000}, "prompt", "prompt"),
        ({"promt": "a"}, None, "unknown field promt"),
        ({"n": "2"}, None, "n: Expected int"),
        ({"n": 0}, "n", "from 1 to 10, got 0"),
        ({"n": 11}, "n", "from 1 to 10, got 11"),
        ({"size": "big"}, "size", "WIDTHxHEIGHT"),
        ({"size": "13x8"}, None, "multiples of"),
        ({"size": "64x64"}, "size", "at most 200 pixels"),
        ({"response_format": "url"}, "response_format", "must be b64_json"),
        ({"output_format": "webp"}, None, "output_format"),
        ({"seed": -1}, "seed", "seed must be between"),
        ({"head_steps": 201}, "head_steps", "from 1 to 200"),
        ({"guidance_scale": -1.0}, "guidance_scale", "guidance_scale"),
        ({"sampler": "quick"}, "sampler", "sampler must be one of fast"),
    ],
)
def test_bad_fields(client, change, param, message):
    answer = client.post(URL, json={"prompt": "a cat", "size": "12x8"} | change)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param and message in error["message"]
    assert "\n" not in error["message"]


def test_other_errors(client):
    answer = client.post(URL, content=b"{")
    assert answer.status_code == 400 and "cannot be read" in answer.json()["error"]["message"]
    answer = client.post(URL, json={"prompt": "a cat", "model": "dall-e-3"})
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
    assert client.get("/v1/models/prompts").json()["id"] == "prompts"
    assert client.get("/v1/models/other").status_code == 404
    assert client.get(URL).status_code == 405 and "error" in client.get(URL).json()
    assert client.get("/v2").status_code == 404 and "error" in client.get("/v2").json()


def test_an_error_of_the_device(client, monkeypatch):
    def full(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: 2 GiB\nof many")
        yield

    monkeypatch.setattr(api, "generate", full)
    answer = client.post(URL, json={"prompt": "a cat", "size": "12x8"})
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert answer.json()["error"]["message"] == "RuntimeError: RESOURCE_EXHAUSTED: 2 GiB"
    assert client.get("/health").json() == {"status": "ok", "requests": 0}


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer s3cret", 200),
        ("bearer s3cret", 200),
        ("Bearer s3cre", 401),
        ("Bearer ü", 401),
        ("s3cret", 401),
        ("Basic s3cret", 401),
        ("", 401),
    ],
)
def test_key(prompts, header, status):
    client = TestClient(api.make_api(prompts, key="s3cret"))
    headers = {"Authorization": header.encode()} if header else {}
    answer = client.get("/v1/models", headers=headers)
    assert answer.status_code == status
    assert client.get("/health").status_code == 200
    if status == 401:
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert client.post(URL, json={"prompt": "a"}, headers=headers).status_code == 401


def test_requests_under_other_names(prompts):
    client = TestClient(Guard(api.make_api(prompts), ["testserver"], refusal))
    assert client.get("/health").status_code == 200
    answer = client.get("/health", headers={"Host": "evil.example.com"})
    assert answer.status_code == 403 and "--names" in answer.json()["error"]["message"]
    answer = client.post(URL, data={"prompt": "a"})
    assert answer.status_code == 415 and "JSON" in answer.json()["error"]["message"]


class Blocked:
    """Replaces sampling by one that goes on when it may, and counts its requests."""

    def __init__(self, monkeypatch, prompts) -> None:
        self.go = threading.Event()
        self.started = threading.Event()
        self.closed = threading.Event()
        self.count = 0
        one = prompts.sample("a cat", 0, size="12x8", progress=False)
        monkeypatch.setattr(api, "generate", lambda *_: self._generate(one))

    def _generate(self, images):
        self.count += 1
        self.started.set()
        try:
            while not self.go.wait(0.02):
                yield api.Partial(1, 2, images)
            yield api.Partial(2, 2, images)
        finally:
            self.closed.set()


BODY = {"prompt": "a cat", "size": "12x8"}


def test_full_queue(prompts, monkeypatch):
    blocked = Blocked(monkeypatch, prompts)

    async def run():
        transport = httpx.ASGITransport(api.make_api(prompts, api.Limits(queue=1)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            accepted = [asyncio.create_task(client.post(URL, json=BODY)) for _ in range(2)]
            while (await client.get("/health")).json()["requests"] < 2:
                await asyncio.sleep(0.01)
            refused = await client.post(URL, json=BODY)
            blocked.go.set()
            answers = await asyncio.gather(*accepted)
            return refused, answers, await client.post(URL, json=BODY)

    refused, answers, later = asyncio.run(run())
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert [answer.status_code for answer in (*answers, later)] == [200] * 3
    assert blocked.count == 3


def test_a_client_that_goes_away_frees_its_place(prompts, monkeypatch):
    blocked = Blocked(monkeypatch, prompts)
    app = api.make_api(prompts, api.Limits(queue=0))
    sent = []

    async def run():
        left = asyncio.Event()
        body = [{"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}]

        async def receive():
            if body:
                return body.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": URL, "headers": [], "query_string": b""}
        request = asyncio.create_task(app(scope, receive, send))
        assert await asyncio.to_thread(blocked.started.wait, 10)
        left.set()
        await asyncio.wait_for(request, 10)
        assert await asyncio.to_thread(blocked.closed.wait, 10)
        blocked.go.set()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(URL, json=BODY)

    assert asyncio.run(run()).status_code == 200
    assert sent[0]["status"] == 499


def test_key_of_a_server(tmp_path, monkeypatch):
    monkeypatch.delenv(api_server.KEY_VARIABLE, raising=False)
    assert api_server.read_key(None) is None
    monkeypatch.setenv(api_server.KEY_VARIABLE, "from-the-environment\n")
    assert api_server.read_key(None) == "from-the-environment"
    file = tmp_path / "key"
    file.write_text("s3cret\n")
    assert api_server.read_key(str(file)) == "s3cret"
    for text in ("", "two keys", "schlüssel"):
        file.write_text(text)
        with pytest.raises(FileError, match="key must hold one key"):
            api_server.read_key(str(file))
    monkeypatch.setenv(api_server.KEY_VARIABLE, "")
    with pytest.raises(FileError, match="BITDANCE_API_KEY must hold one key"):
        api_server.read_key(None)


def test_without_uvicorn(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r'pip install "bitdance_jax\[api\]"'):
        api_server.import_uvicorn()


def test_the_fields_are_documented():
    page = (Path(__file__).parents[2] / "docs" / "api_server.md").read_text()
    missing = [name for name in api.ImageRequest.__struct_fields__ if f"`{name}`" not in page]
    assert not missing
