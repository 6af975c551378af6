"""The web page: its layout, and the gallery that fills while images are generated."""

import os
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Generator
from typing import Any

import numpy as np

from bitdance_jax.app.background import in_thread
from bitdance_jax.app.generation import Request, failure, generate, options
from bitdance_jax.app.page_inputs import make_inputs
from bitdance_jax.io.image_files import save_png
from bitdance_jax.pipelines.pipeline import Pipeline


ABOUT = (
    "Generates images with BitDance: patch after patch, each in a few steps of a diffusion over "
    "bits. They appear while they are generated."
)

STYLE = """
#images .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(min(10rem, 30%), 1fr)) !important;
}
#images .thumbnail-item {
  display: flex; flex-direction: column; aspect-ratio: auto; height: auto;
}
#images .thumbnail-item img {min-height: 0}
#images .caption-label {
  position: static; align-self: stretch; max-width: none; border: 0; text-align: center;
}
@media (max-width: 640px) {
  #images:not(:has(.preview)), #images:not(:has(.preview)) .grid-wrap {height: auto !important}
}
"""
"""As many images side by side as the screen has room for, with captions below them. On a phone the
gallery, except for an enlarged image, is as high as its images."""


def captions(model: Pipeline, request: Request) -> list[str | None]:
    """The text below each image: its class."""
    if model.kind == "text_to_image":
        return [None] * request.images
    return [
        model.class_names[int(label)] for label in request.subject for _ in range(request.images)
    ]


class Updates:
    """What the gallery and the line above it show while a request is processed."""

    def __init__(self, gradio: Any, model: Pipeline) -> None:
        self._gradio = gradio
        self._model = model
        # Two requests at a time would need twice the memory.
        self._lock = threading.Lock()

    async def of_fields(self, *fields: Any) -> AsyncIterator[tuple[Any, str]]:
        """The updates for the values of the input fields; errors are shown as well."""
        gradio = self._gradio
        yield gradio.skip(), "starting; the first images of a size wait for the compiler"
        try:
            async for update in in_thread(lambda: self._of_request(Request(*fields)), self._lock):
                yield update
        except Exception as error:
            message = failure(error)
            gradio.Warning(message)
            yield gradio.skip(), message

    def _of_request(self, request: Request) -> Generator[tuple[Any, str], None, None]:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            for sampled, patches, images in generate(self._model, request):
                is_last = sampled == patches
                items = _save(folder, self._model, request, images) if is_last else images
                shown: Any = list(zip(items, captions(self._model, request), strict=True))
                if sampled == 1:
                    # A single image is opened, which enlarges it, until the visitor closes it.
                    opened = 0 if len(shown) == 1 else None
                    shown = self._gradio.Gallery(shown, selected_index=opened)
                seconds = time.monotonic() - start
                state = "done" if is_last else "generating"
                yield shown, f"{state}: {sampled} of {patches} patches, {seconds:.1f} s"


def _save(folder: str, model: Pipeline, request: Request, images: np.ndarray) -> list[str]:
    """Saves PNG files, which a browser downloads under their names."""
    texts = model.metadata(request.subject, **options(model, request))
    paths = [os.path.join(folder, f"seed-{request.seed}-{i:02d}.png") for i in range(len(images))]
    for path, image, text in zip(paths, images, texts, strict=True):
        save_png(path, image, text=text)
    return paths


def make_page(gradio: Any, model: Pipeline, name: str) -> Any:
    """The page of a model, a `gradio.Blocks`."""
    updates = Updates(gradio, model)
    with gradio.Blocks(
        title=f"BitDance: {name}", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        gradio.Markdown(f"## BitDance: {name}\n{ABOUT}")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=300):
                inputs = make_inputs(gradio, model)
            with gradio.Column(scale=2):
                start, stop, status, images = _outputs(gradio, model)
        # One event for all visitors: the queue starts a request when the previous one has ended.
        event = start.click(
            updates.of_fields,
            inputs,
            [images, status],
            concurrency_limit=1,
            show_progress="minimal",
            show_progress_on=status,
        )
        stop.click(None, cancels=[event])
        # In the browser, after the last update of the event, so that no update overwrites it.
        event.then(
            None, status, status, js="text => text.replace(/^(starting.*|generating)/, 'stopped')"
        )
    return page


def _outputs(gradio: Any, model: Pipeline) -> tuple[Any, Any, Any, Any]:
    """The buttons, the line of text and the gallery."""
    with gradio.Row():
        start = gradio.Button(
            "Generate", variant="primary", scale=2, min_width=100, elem_id="generate"
        )
        stop = gradio.Button("Stop", variant="stop", scale=1, min_width=100, elem_id="stop")
    status = gradio.Textbox(show_label=False, interactive=False, container=False, elem_id="status")
    images = gradio.Gallery(
        show_label=False,
        height=720,
        object_fit="contain",
        format="jpeg" if model.kind == "text_to_image" else "png",
        interactive=False,
        buttons=["download", "download_all", "fullscreen"],
        elem_id="images",
    )
    return start, stop, status, images
