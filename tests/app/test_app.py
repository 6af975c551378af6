"""The web page: images of a request, warnings, and the page in a browser where there is one."""

import asyncio
import contextlib
import dataclasses
import http.client
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from PIL import Image

from bitdance_jax import ConfigError, FileError, UserError
from bitdance_jax.app import page as page_module
from bitdance_jax.app import serve as app
from bitdance_jax.app.generation import Request, generate
from bitdance_jax.app.page_inputs import PROMPTS, max_per_class
from bitdance_jax.data.emoji import EXAMPLES
from bitdance_jax.pipelines import toy_text_to_image
from bitdance_jax.pipelines.load import load


REQUEST = Request(subject=[0, 3], size="16x16", images=2, seed=5, steps=3, guidance=2.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_models.save_model(root / "classes")
    tiny_models.save_tokenizer(root / "tokenizer")
    toy_text_to_image.save(root / "prompts", tiny_models.TEXT_TO_IMAGE)
    return root


@pytest.fixture(scope="module")
def classes(folders):
    return load(folders / "classes")


@pytest.fixture(scope="module")
def prompts(folders):
    return load(folders / "prompts")


def test_classes(classes):
    *previews, last = generate(classes, REQUEST)
    assert [partial.sampled for partial in previews] == list(range(1, 16)) and last.sampled == 16
    sampler = dataclasses.replace(classes.sampler, head_steps=3, guidance_scale=2.0)
    *_, expected = classes.sample_steps([0, 0, 3, 3], 5, every=1, sampler=sampler)
    np.testing.assert_array_equal(last.images, expected.images)


def test_prompt(prompts):
    *previews, last = generate(prompts, REQUEST._replace(subject="a cat", size="12x8"))
    assert previews and last.sampled == last.patches == 6
    sampler = dataclasses.replace(prompts.sampler, head_steps=3, guidance_scale=2.0)
    *_, expected = prompts.sample_steps(
        "a cat", every=5, size="12x8", images_per_input=2, seed=5, sampler=sampler
    )
    np.testing.assert_array_equal(last.images, expected.images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subject": []}, "choose at least one class"),
        ({"seed": None}, "seed is empty"),
        ({"seed": -1}, "seed must be between"),
        ({"steps": 0}, "head_steps must be positive"),
        ({"images": 33}, "66 images are too many"),
    ],
)
def test_bad_requests_for_classes(classes, change, message):
    with pytest.raises(UserError, match=message):
        next(generate(classes, REQUEST._replace(**change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subject": " "}, "prompt"),
        ({"size": "12"}, "WIDTHxHEIGHT"),
        ({"size": "13x8"}, "13"),
        ({"size": None}, "size is empty"),
    ],
)
def test_bad_requests_for_prompts(prompts, change, message):
    with pytest.raises(UserError, match=message):
        next(generate(prompts, REQUEST._replace(subject="a cat", size="12x8")._replace(**change)))


@pytest.mark.parametrize(
    ("name", "flags", "error", "message"),
    [
        ("tokenizer", [], FileError, "tokenizer"),
        ("classes", ["--weights", "int8"], ConfigError, "weights"),
    ],
)
def test_models_that_the_page_cannot_show(folders, monkeypatch, name, flags, error, message):
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    argv = ["app", "--checkpoint", str(folders / name), "--port", port, *flags]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(error, match=message):
        app.main()


def test_an_address_where_nothing_can_be_served():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        addresses = [
            ("127.0.0.1", taken.getsockname()[1]),
            ("", 7860),
            ("192.0.2.1", 7860),
            ("a" * 70 + ".b", 7860),
        ]
        for host, port in addresses:
            with pytest.raises(
                UserError, match=r"^cannot serve at .*; choose another host or port$"
            ):
                app.check_address(host, port)


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r'pip install "bitdance_jax\[app\]"'):
        app.import_gradio()


@pytest.fixture
def page(request, kind):
    """The function behind the button, valid fields, and the pop-ups that it shows."""
    gradio = pytest.importorskip("gradio")
    events = page_module.make_page(gradio, request.getfixturevalue(kind), kind).fns.values()
    (main,) = (event for event in events if event.concurrency_limit == 1)
    assert any(main._id in event.cancels for event in events)
    warnings = []
    request.getfixturevalue("monkeypatch").setattr(gradio, "Warning", warnings.append)
    return (
        main.fn,
        REQUEST if kind == "classes" else REQUEST._replace(subject="a cat", size="12x8"),
        warnings,
    )


def updates(stream):
    async def collect():
        return [shown async for shown in stream]

    return asyncio.run(collect())


@pytest.mark.parametrize("kind", ["classes", "prompts"])
def test_gallery_and_warnings(page, kind):
    on_click, good, warnings = page
    (_, started), *partly, (images, status) = updates(on_click(*good))
    assert (
        started.startswith("starting")
        and partly
        and all(text.startswith("generating: ") for _, text in partly)
    )
    assert re.fullmatch(r"done: (16 of 16|6 of 6) patches, \d+\.\d s", status)
    assert [caption for _, caption in images] == (
        ["0", "0", "3", "3"] if kind == "classes" else [None, None]
    )
    assert [os.path.basename(file) for file, _ in images][:2] == [
        "seed-5-00.png",
        "seed-5-01.png",
    ]
    *_, (_, status) = updates(on_click(*good._replace(seed=None)))
    assert [status] == warnings == ["seed is empty; fill it in"]


@pytest.mark.parametrize("kind", ["classes"])
def test_a_request_after_one_that_was_stopped_or_failed(page, monkeypatch):
    on_click, good, warnings = page

    async def stop_one_while_another_waits():
        stopped, waiting = on_click(*good), on_click(*good)
        streams = (stopped, waiting, stopped)
        texts = [(await anext(stream))[1] for stream in streams]
        words = [re.match("[a-z]+", text)[0] for text in texts]
        assert words == ["starting", "starting", "generating"]
        first = asyncio.ensure_future(anext(waiting))
        done, _ = await asyncio.wait([first], timeout=0.5)
        assert not done  # Two at a time would need twice the memory.
        await stopped.aclose()
        assert (await first)[1].startswith("generating: 1 of 16")
        await waiting.aclose()

    asyncio.run(stop_one_while_another_waits())
    with monkeypatch.context() as patch:
        patch.setattr(page_module, "generate", lambda *_: jnp.zeros(2**50, jnp.int8))
        *_, (_, status) = updates(on_click(*good))
    assert [status] == warnings and status.startswith(
        "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory"
    )
    *_, (_, status) = updates(on_click(*good))
    assert status.startswith("done")


def test_the_number_of_images_is_limited(classes):
    gradio = pytest.importorskip("gradio")
    (limit,) = [
        event.fn
        for event in page_module.make_page(gradio, classes, "").fns.values()
        if event.concurrency_limit != 1 and event.fn
    ]
    assert {n: max_per_class(n) for n in (0, 1, 9, 64)} == {0: 64, 1: 64, 9: 7, 64: 1}
    slider = limit(list(range(9)), 16)
    assert (slider.maximum, slider.value) == (7, 7)
    assert limit([0], 7).value == 7


def test_the_embedded_model_suggests_prompts_and_its_size():
    gradio = pytest.importorskip("gradio")
    model = load(app.Arguments().checkpoint, lazy=True)
    blocks = page_module.make_page(gradio, model, model.name).blocks.values()
    fields = {block.elem_id: block for block in blocks if getattr(block, "elem_id", None)}
    assert fields["size"].value == "128x128" and fields["subject"].placeholder == EXAMPLES[0]
    (examples,) = (block for block in blocks if isinstance(block, gradio.Dataset))
    assert [prompt for (prompt,) in examples.raw_samples] == list(EXAMPLES)


def test_server(classes, monkeypatch):
    """Its first requests are Gradio's own; behind a proxy they reach it as well."""
    gradio = pytest.importorskip("gradio")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    blocks = page_module.make_page(gradio, classes, "")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        app.start_server(blocks, app.Arguments(port=port, names=("images.example.com",)))
    try:
        assert said.getvalue() == f"the page is at http://127.0.0.1:{port}/ until Ctrl-C\n"

        def status(method: str, path: str, body: bytes = b"", **headers: str) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request(
                method,
                path,
                body,
                {name.replace("_", "-"): value for name, value in headers.items()},
            )
            return connection.getresponse().status

        assert (
            status("GET", "/config") == status("GET", "/config", Host="images.example.com") == 200
        )
        assert status("GET", "/config", Host=f"elsewhere.example.com:{port}") == 403
        cancel = json.dumps({"session_hash": "a", "fn_index": 0, "event_id": "b"}).encode()
        assert status("POST", "/gradio_api/cancel", cancel, Content_Type="application/json") == 200
        elsewhere = {"Content_Type": "application/json", "Origin": "http://elsewhere.example.com"}
        assert status("POST", "/gradio_api/cancel", cancel, **elsewhere) == 403
        disposition = b"Content-Disposition: form-data; name=files; filename=a.png"
        form = b"--a\r\n" + disposition + b"\r\n\r\n0\r\n--a--\r\n"
        assert (
            status(
                "POST", "/gradio_api/upload", form, Content_Type="multipart/form-data; boundary=a"
            )
            == 415
        )
    finally:
        blocks.close()


class Page:
    """A server's page in a browser."""

    def __init__(self, sync_api, page, address):
        self.expect, self.page, self.address, self.elsewhere = sync_api.expect, page, address, []
        page.set_default_timeout(60_000)
        page.on("request", self._note)
        for _ in range(240):
            try:
                page.goto(address)
                break
            except sync_api.Error:  # it is still starting
                page.wait_for_timeout(500)
        self.images = page.locator("#images .grid-container img")

    def _note(self, request):
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def fill(self, **fields):
        for name, value in fields.items():
            self.page.locator(f"#{name} textarea, #{name} input").first.fill(value)

    def press(self, button):
        self.page.locator(f"#{button}").click()

    def wait_for_status(self, pattern):
        """Minutes: the model may have to be compiled, on a machine with other work."""
        self.expect(self.page.locator("#status textarea, #status input")).to_have_value(
            re.compile(pattern), timeout=400_000
        )

    def wait_for_warning(self, text):
        self.expect(self.page.get_by_text(text).last).to_be_visible()
        self.wait_for_status(text)


@pytest.fixture
def open_page(folders, tmp_path):
    """Serves a model and opens its page."""
    pytest.importorskip("gradio")
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium")
    with contextlib.ExitStack() as stack:

        def open_page(kind):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command = [
                sys.executable,
                "-m",
                "bitdance_jax.app",
                "--checkpoint",
                str(folders / kind),
                "--port",
                str(port),
            ]
            log = stack.enter_context((tmp_path / "log").open("wb"))
            environment = os.environ | {
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                "http_proxy": "http://127.0.0.1:9",
            }
            server = stack.enter_context(
                subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            )
            stack.callback(server.terminate)
            browser = stack.enter_context(sync_api.sync_playwright()).chromium.launch(
                executable_path=chromium, args=["--no-sandbox"]
            )
            stack.callback(browser.close)
            return Page(sync_api, browser.new_page(), f"http://127.0.0.1:{port}")

        yield open_page
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_classes_in_a_browser(open_page, tmp_path):
    page = open_page("classes")
    page.fill(steps="200", count="7")  # long enough to be stopped
    page.press("generate")
    page.wait_for_status("^generating: ")
    page.expect(page.images).to_have_count(63)
    page.press("stop")
    page.wait_for_status("^stopped: ")
    page.fill(steps="2", count="1")
    page.press("generate")
    page.wait_for_status("^done: 16 of 16 patches")
    page.expect(page.images).to_have_count(9)
    page.fill(seed="")
    page.press("generate")
    page.wait_for_warning("seed is empty; fill it in")
    page.expect(page.images).to_have_count(9)
    page.images.nth(2).click()
    with page.page.expect_download() as download:
        page.page.get_by_label("Download", exact=True).click()
    assert download.value.suggested_filename == "seed-0-02.png"
    download.value.save_as(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (16, 16)
    page.press("another")
    page.expect(page.page.locator("#seed input")).to_have_value(re.compile(r"^\d+$"))
    assert not page.elsewhere


@pytest.mark.slow
def test_prompts_in_a_browser(open_page):
    page = open_page("prompts")
    page.fill(size="128x128")
    page.press("generate")
    page.wait_for_warning("a prompt is empty; describe the image")
    page.fill(subject="a cat", size="13x8")
    page.press("generate")
    page.wait_for_warning("multiples of 4 up to 128 pixels, got 13x8")
    page.fill(size="128x128", steps="200", count="4")  # long enough to be stopped
    page.press("generate")
    page.wait_for_status("^generating: ")
    page.press("stop")
    page.wait_for_status("^stopped: ")
    page.page.get_by_text(PROMPTS[-1]).click()
    page.expect(page.page.locator("#subject textarea")).to_have_value(PROMPTS[-1])
    page.fill(size="16x12", steps="2", count="3")
    page.press("generate")
    page.wait_for_status("^done: 12 of 12 patches")
    page.expect(page.images).to_have_count(3)
    assert not page.elsewhere
