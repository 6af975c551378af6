"""The web page: what it draws for a wish, its warnings, and the page itself in a browser where there is one."""

import dataclasses
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny_models

from bitdance_jax import UserError, app, toy_text_to_image
from bitdance_jax.app import Wish, draw
from bitdance_jax.config import FlowHeadConfig, TokenizerConfig


pytestmark = pytest.mark.usefixtures("quick_compilation")

WISH = Wish(subject=[0, 3], size="16x16", pictures=2, seed=5, steps=3, guidance=2.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_models.save_model(root / "classes")
    tiny_models.save_tokenizer(root / "tokenizer")
    small = dataclasses.replace(
        toy_text_to_image.config(),
        tokenizer=TokenizerConfig(bits=8, ch=32, ch_mult=(1, 1), num_res_blocks=1, num_codebooks=2),
        head=FlowHeadConfig(width=32, num_blocks=1, num_groups=1, head_dim=16, squash_output=True),
    )
    toy_text_to_image.save(root / "prompts", small)
    return root


@pytest.fixture(scope="module")
def classes(folders):
    return app.load_drawer(app.Arguments(str(folders / "classes")))


@pytest.fixture(scope="module")
def prompts(folders):
    return app.load_drawer(app.Arguments(str(folders / "prompts")))


def test_classes(classes):
    *previews, last = draw(classes, WISH)
    assert [partial.drawn for partial in previews] == list(range(1, 16)) and last.drawn == 16
    sampler = dataclasses.replace(classes.sampler, head_steps=3, guidance_scale=2.0)
    *_, expected = classes.sample_steps([0, 0, 3, 3], 5, every=1, sampler=sampler)
    np.testing.assert_array_equal(last.pictures, expected.pictures)


def test_prompt(prompts):
    *previews, last = draw(prompts, WISH._replace(subject="a cat", size="12x8"))
    assert previews and last.drawn == last.patches == 6
    sampler = dataclasses.replace(prompts.sampler, head_steps=3, guidance_scale=2.0)
    *_, expected = prompts.generate_steps("a cat", every=5, size="12x8", images_per_prompt=2, seed=5, sampler=sampler)
    np.testing.assert_array_equal(last.pictures, expected.pictures)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subject": []}, "choose at least one class"),
        ({"seed": None}, "seed is empty"),
        ({"seed": -1}, "seed must be between"),
        ({"steps": 0}, "head_steps must be positive"),
        ({"pictures": 33}, "66 pictures are too many"),
    ],
)
def test_bad_wishes_for_classes(classes, change, message):
    with pytest.raises(UserError, match=message):
        next(draw(classes, WISH._replace(**change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"subject": " "}, "prompt"), ({"size": "12"}, "WIDTHxHEIGHT"), ({"size": "13x8"}, "13"), ({"size": None}, "size is empty")],
)
def test_bad_wishes_for_prompts(prompts, change, message):
    with pytest.raises(UserError, match=message):
        next(draw(prompts, WISH._replace(subject="a cat", size="12x8")._replace(**change)))


def test_models_that_the_page_cannot_show(folders):
    with pytest.raises(UserError, match="is a tokenizer"):
        app.load_drawer(app.Arguments(str(folders / "tokenizer")))
    with pytest.raises(UserError, match="--weights belongs to text-to-image"):
        app.load_drawer(app.Arguments(str(folders / "classes"), weights="int8"))


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r'pip install "bitdance_jax\[app\]"'):
        app.import_gradio()


@pytest.mark.parametrize("kind", ["classes", "prompts"])
def test_gallery_and_warnings(request, kind, monkeypatch):
    gradio = pytest.importorskip("gradio")
    page = app.make_page(gradio, request.getfixturevalue(kind), kind)
    drawing, *stop = page.fns.values()
    assert drawing.concurrency_limit == 1 and any(drawing._id in each.cancels for each in stop)
    good = WISH if kind == "classes" else WISH._replace(subject="a cat", size="12x8")
    started, *partly, (pictures, status) = drawing.fn(*good)
    assert started[0] == [] and all("drawing" in text for _, text in partly)
    assert len(pictures) == (4 if kind == "classes" else 2) and status.startswith("done")
    warnings = []
    monkeypatch.setattr(gradio, "Warning", warnings.append)
    assert list(drawing.fn(*good._replace(seed=None)))[-1] == ([], "")
    assert warnings == ["seed is empty; fill it in"]


@pytest.mark.slow
def test_in_a_browser(folders, tmp_path):
    pytest.importorskip("gradio")
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path / "log").open("wb")
    command = [sys.executable, "-m", "bitdance_jax.app", "--checkpoint", str(folders / "classes"), "--port", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ)
    try:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            _use_page(sync_api, browser.new_page(), f"http://127.0.0.1:{port}")
            browser.close()
    finally:
        server.terminate()
        server.wait()
        log.close()


def _use_page(sync_api, page, address):
    page.set_default_timeout(60_000)
    elsewhere = []
    page.on("request", lambda request: None if request.url.startswith((address, "data:", "blob:")) else elsewhere.append(request.url))
    for _ in range(120):
        try:
            page.goto(address)
            break
        except sync_api.Error:  # it is still starting
            page.wait_for_timeout(500)
    status, pictures = page.locator("#status textarea, #status input"), page.locator("#pictures button img")
    page.locator("#steps input[type=number]").fill("2")
    page.locator("#draw").click()
    sync_api.expect(status).to_have_value("done: 16 of 16 patches", timeout=400_000)
    sync_api.expect(pictures).to_have_count(9)
    page.locator("#seed input").fill("")
    page.locator("#draw").click()
    sync_api.expect(page.get_by_text("seed is empty; fill it in")).to_be_visible()
    page.locator("#seed input").fill("1")
    page.locator("#steps input[type=number]").fill("200")
    page.locator("#draw").click()
    page.locator("#stop").click()
    sync_api.expect(status).to_have_value("stopped")
    assert not elsewhere
