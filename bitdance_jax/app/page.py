"""The web page: what its fields mean, and what its gallery shows while they are drawn."""

import dataclasses
import logging
import os
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bitdance_jax.app.background import in_thread
from bitdance_jax.errors import UserError
from bitdance_jax.io.image_files import save_png
from bitdance_jax.pipelines.partial_images import Partial
from bitdance_jax.pipelines.pipeline import Pipeline


ABOUT = "Draws images as BitDance does: patch after patch, each in a few steps of a diffusion over bits. They appear while they are drawn."
"""What the page is."""

PREVIEWS = 16
"""How often the partly drawn images are shown, about."""

MAX_IMAGES = 64
"""Drawn at a time; they are one batch."""

SIZES = ("1024x1024", "1280x768", "768x1280", "512x512", "2048x512", "512x2048")
"""Proposed for text-to-image models; others can be typed."""

PROMPTS = (
    "a red fox in fresh snow, watercolour",
    "a lighthouse on a cliff at dusk, long exposure",
    "一只橘猫在窗台上看雨",
)
"""Proposed likewise."""

STYLE = """
#images .grid-container {grid-template-columns: repeat(auto-fill, minmax(min(10rem, 30%), 1fr)) !important}
#images .thumbnail-item {display: flex; flex-direction: column; aspect-ratio: auto; height: auto}
#images .thumbnail-item img {min-height: 0}
#images .caption-label {position: static; align-self: stretch; max-width: none; border: 0; text-align: center}
"""
"""Of the page: as many images side by side as the screen has room for, and captions below them."""


class Wish(NamedTuple):
    """What the page's fields hold.

    Attributes:
      subject: the prompt, or the numbers of the classes.
      size: WIDTHxHEIGHT; of a class-conditional model its own.
      images: of the prompt, or of each class.
      seed, steps, guidance: as in `SamplerConfig`.
    """

    subject: str | Sequence[int]
    size: str
    images: int
    seed: int
    steps: int
    guidance: float


def draw(model: Pipeline, wish: Wish) -> Iterator[Partial]:
    """The images of a wish while they are drawn.

    Raises:
      UserError: something that the model cannot draw.
    """
    for name, value in wish._asdict().items():
        if value is None:  # so Gradio gives an emptied field
            raise UserError(f"{name} is empty; fill it in")
    total = len(captions(model, wish))
    if total > MAX_IMAGES:
        raise UserError(f"{total} images are too many at a time; {MAX_IMAGES} are the most")
    if model.kind == "class_conditional" and not wish.subject:
        raise UserError("choose at least one class")
    every = max(1, model.num_patches(wish.size) // PREVIEWS)
    return model.sample_steps(wish.subject, every=every, **options(model, wish))


def options(model: Pipeline, wish: Wish) -> dict[str, Any]:
    """Arguments of `Pipeline.sample_steps` and `describe`."""
    sampler = dataclasses.replace(
        model.sampler, head_steps=wish.steps, guidance_scale=float(wish.guidance)
    )
    return {
        "seed": wish.seed,
        "images_per_input": wish.images,
        "size": wish.size,
        "sampler": sampler,
    }


def captions(model: Pipeline, wish: Wish) -> list[str | None]:
    """What is written below each image: its class."""
    if model.kind == "text_to_image":
        return [None] * wish.images
    return [model.class_names[int(label)] for label in wish.subject for _ in range(wish.images)]


def make_page(gradio: Any, model: Pipeline, name: str) -> Any:
    """The page, a `gradio.Blocks`, that draws with a model."""
    turn = threading.Lock()  # two drawings at a time would need the memory of two

    def grow(wish: Wish) -> Generator[tuple[Any, str], None, None]:
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            for sampled, patches, images in draw(model, wish):
                last = sampled == patches
                shown = list(
                    zip(
                        _save(folder, model, wish, images) if last else images,
                        captions(model, wish),
                        strict=True,
                    )
                )
                status = f"{'done' if last else 'drawing'}: {sampled} of {patches} patches, {time.monotonic() - start:.1f} s"
                # At first a single image is opened, which makes it as large as the gallery; later that is up to the visitor.
                yield (
                    gradio.Gallery(shown, selected_index=0 if len(shown) == 1 else None)
                    if sampled == 1
                    else shown,
                    status,
                )

    async def on_draw(*fields: Any) -> AsyncIterator[tuple[Any, str]]:
        """What the gallery and the line above it show."""
        yield (
            gradio.skip(),
            "starting; the first images of a kind wait until the model is compiled",
        )
        try:
            async for shown in in_thread(lambda: grow(Wish(*fields)), turn):
                yield shown
        except Exception as error:
            complaint = str(error)
            if not isinstance(
                error, UserError
            ):  # one of XLA, say, whose memory is full: the next drawing may be a smaller one
                logging.exception("a drawing failed")
                complaint = type(error).__name__ + ": " + complaint.partition("\n")[0]
            gradio.Warning(complaint)
            yield gradio.skip(), complaint

    with gradio.Blocks(
        title=f"BitDance: {name}", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        gradio.Markdown(f"## BitDance: {name}\n{ABOUT}")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=300):
                inputs = _inputs(gradio, model)
            with gradio.Column(scale=2):
                with gradio.Row():
                    start = gradio.Button(
                        "Draw", variant="primary", scale=2, min_width=100, elem_id="draw"
                    )
                    stop = gradio.Button(
                        "Stop", variant="stop", scale=1, min_width=100, elem_id="stop"
                    )
                status = gradio.Textbox(
                    show_label=False, interactive=False, container=False, elem_id="status"
                )
                images = gradio.Gallery(
                    show_label=False,
                    height=720,
                    object_fit="contain",
                    format="jpeg" if model.kind == "text_to_image" else "png",
                    interactive=False,
                    buttons=["download", "download_all", "fullscreen"],
                    elem_id="images",
                )
        # One event for all visitors together: the queue starts a drawing when the one before has ended.
        drawing = start.click(
            on_draw,
            inputs,
            [images, status],
            concurrency_limit=1,
            show_progress="minimal",
            show_progress_on=status,
        )
        stop.click(None, cancels=[drawing])
        # After its last event, in the browser: nothing of the drawing can come later and take the word back.
        drawing.then(
            None, status, status, js="text => text.replace(/^(starting.*|drawing)/, 'stopped')"
        )
    return page


def _save(folder: str, model: Pipeline, wish: Wish, images: np.ndarray) -> list[str]:
    """PNG files, whose names a browser keeps when it saves them; their text says how they were sampled."""
    texts = model.describe(wish.subject, **options(model, wish))
    paths = [os.path.join(folder, f"seed-{wish.seed}-{i:02d}.png") for i in range(len(images))]
    for path, image, text in zip(paths, images, texts, strict=True):
        save_png(path, image, text=text)
    return paths


def _inputs(gradio: Any, model: Pipeline) -> list[Any]:
    """The fields of a `Wish`."""
    if model.kind == "text_to_image":
        subject = gradio.Textbox(
            label="Prompt",
            info="What the images shall show, in words.",
            lines=3,
            placeholder=PROMPTS[0],
            elem_id="subject",
        )
        gradio.Examples([[prompt] for prompt in PROMPTS], subject, label="Such as")
        size = gradio.Dropdown(
            SIZES,
            value=SIZES[0],
            allow_custom_value=True,
            label="Size",
            info="Width x height in pixels; others can be typed.",
            elem_id="size",
        )
        count = gradio.Slider(
            1,
            16,
            value=1,
            step=1,
            label="Images",
            info="Of the prompt, drawn together.",
            elem_id="count",
        )
    else:
        names = [(name, label) for label, name in enumerate(model.class_names)]
        chosen = list(range(min(9, len(names))))
        subject = gradio.Dropdown(
            names,
            value=chosen,
            multiselect=True,
            max_choices=MAX_IMAGES,
            label="Classes",
            info="What the images shall show; type to search.",
            elem_id="subject",
        )
        height, width = model.default_size
        size = gradio.Textbox(
            f"{width}x{height}",
            label="Size",
            info="The model's own.",
            interactive=False,
            elem_id="size",
        )
        count = gradio.Slider(
            1,
            most_of_each(len(chosen)),
            value=1,
            step=1,
            label="Images of each class",
            info=f"All classes together at most {MAX_IMAGES}.",
            elem_id="count",
        )
        subject.change(_limit(gradio), [subject, count], count, queue=False, show_progress="hidden")
    seed = gradio.Number(
        0,
        precision=0,
        label="Seed",
        info="The same number draws the same images again.",
        elem_id="seed",
    )
    gradio.Button("Another seed", size="sm", elem_id="another").click(
        None, None, seed, js=f"() => Math.floor(Math.random() * {2**32})"
    )
    steps = gradio.Slider(
        1,
        200,
        value=model.sampler.head_steps,
        step=1,
        label="Steps",
        info="Of the diffusion that draws each patch: more are finer and slower.",
        elem_id="steps",
    )
    guidance = gradio.Slider(
        0,
        20,
        value=model.sampler.guidance_scale,
        step=0.1,
        label="Guidance",
        info="More is closer to what is asked for, and less varied; 1 is none.",
        elem_id="guidance",
    )
    return [subject, size, count, seed, steps, guidance]


def most_of_each(classes: int) -> int:
    """Images of each of so many classes that can be drawn at a time."""
    return max(1, MAX_IMAGES // max(classes, 1))


def _limit(gradio: Any) -> Callable[[list[int], int], Any]:
    """Keeps the number of images to what can be drawn of the chosen classes."""

    def limit(chosen: list[int], count: int) -> Any:
        most = most_of_each(len(chosen))
        return gradio.Slider(maximum=most, value=min(count, most))

    return limit
