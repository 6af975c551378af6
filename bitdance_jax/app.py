"""A web page that draws: `python -m bitdance_jax.app` with the embedded emoji model, `--checkpoint FOLDER` with any other.

Classes or a prompt go in; a gallery fills in while the patches are drawn. The page needs Gradio (the extra `app`) and no internet.
"""

import dataclasses
import logging
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from bitdance_jax import ClassConditionalPipeline, TextToImage, load, saved_models
from bitdance_jax.command_line import keep_compiled, parse, run
from bitdance_jax.errors import UserError
from bitdance_jax.images import save_png
from bitdance_jax.sampling.partial import Partial
from bitdance_jax.sampling.text_to_image import Weights, parse_size
from bitdance_jax.saved_models import EMBEDDED


PREVIEWS = 16
"""How often the partly drawn pictures are shown, about."""

MAX_PICTURES = 64
"""Drawn at a time; they are one batch."""

SIZES = ("1024x1024", "1280x768", "768x1280", "512x512", "2048x512", "512x2048")
"""Proposed for text-to-image models; others can be typed."""

PROMPTS = ("a red fox in fresh snow, watercolour", "a lighthouse on a cliff at dusk, long exposure", "一只橘猫在窗台上看雨")
"""Proposed likewise."""

STYLE = "#pictures .grid-container {grid-template-columns: repeat(auto-fill, minmax(min(10rem, 30%), 1fr)) !important}"
"""Of the page: as many pictures side by side as the screen has room for."""


@dataclass(frozen=True)
class Arguments:
    """Serves a web page that draws pictures.

    Attributes:
      checkpoint: class-conditional or text-to-image model folder, local or gs://; "emoji" is the small model that comes with the package.
      host: address to listen at; 0.0.0.0 lets other machines in.
      port: of that address.
      share: also a public address for 72 hours, through Gradio's servers.
      dtype: of weights and activations; float32 if left out, but for prompts on accelerators bfloat16.
      weights: the type that a text-to-image model's weights are kept in, `dtype` if left out.
      compilation_cache: folder, local or gs://, where compiled programs are kept: the first pictures come sooner the next time.
    """

    checkpoint: str = EMBEDDED
    host: str = "127.0.0.1"
    port: int = 7860
    share: bool = False
    dtype: Literal["float32", "bfloat16"] | None = None
    weights: Weights | None = None
    compilation_cache: str | None = None


class Wish(NamedTuple):
    """What the page's fields hold.

    Attributes:
      subject: the prompt, or the numbers of the classes.
      size: WIDTHxHEIGHT; of a class-conditional model its own.
      pictures: of the prompt, or of each class.
      seed, steps, guidance: as in `SamplerConfig`.
    """

    subject: str | Sequence[int]
    size: str
    pictures: int
    seed: int
    steps: int
    guidance: float


Drawer = ClassConditionalPipeline | TextToImage


def main() -> None:
    arguments = parse(Arguments, prog="python -m bitdance_jax.app")
    gradio = import_gradio()
    if not 0 < arguments.port < 2**16:
        raise UserError(f"--port must be between 1 and {2**16 - 1}, got {arguments.port}")
    if arguments.compilation_cache is not None:
        keep_compiled(arguments.compilation_cache)
    page = make_page(gradio, load_drawer(arguments), os.path.basename(os.path.normpath(arguments.checkpoint)))
    try:
        page.launch(server_name=arguments.host, server_port=arguments.port, share=arguments.share, ssr_mode=False, css=STYLE)
    except OSError as error:  # Gradio's, of a port that is taken, has several lines
        raise UserError(f"cannot serve at {arguments.host}:{arguments.port}: {str(error).splitlines()[0]}") from None


def import_gradio() -> Any:
    """Gradio, told to keep to itself."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ModuleNotFoundError:
        raise UserError('the web page needs Gradio: pip install "bitdance_jax[app]"') from None
    return gradio


def load_drawer(arguments: Arguments) -> Drawer:
    kind = saved_models.read_config(arguments.checkpoint).kind
    if kind == "text_to_image":
        return TextToImage.load(arguments.checkpoint, dtype=arguments.dtype, weights=arguments.weights)
    if arguments.weights is not None:
        raise UserError(f"{arguments.checkpoint} is a {kind} model; --weights belongs to text-to-image ones")
    model = load(arguments.checkpoint, arguments.dtype)
    if not isinstance(model, ClassConditionalPipeline):
        raise UserError(f"{arguments.checkpoint} is a tokenizer, which draws nothing by itself; give a model")
    return model


def draw(model: Drawer, wish: Wish) -> Iterator[Partial]:
    """The pictures of a wish while they are drawn.

    Raises:
      UserError: something that the model cannot draw.
    """
    for name, value in wish._asdict().items():
        if value is None:  # so Gradio gives an emptied field
            raise UserError(f"{name} is empty; fill it in")
    total = len(captions(model, wish))
    if total > MAX_PICTURES:
        raise UserError(f"{total} pictures are too many at a time; {MAX_PICTURES} are the most")
    sampler = dataclasses.replace(model.sampler, head_steps=wish.steps, guidance_scale=float(wish.guidance))
    if isinstance(model, TextToImage):
        size, prompt, count = parse_size(wish.size), str(wish.subject), wish.pictures
        every = max(1, math.prod(size) // model.config.size_multiple**2 // PREVIEWS)
        return model.generate_steps(prompt, every=every, size=size, images_per_prompt=count, seed=wish.seed, sampler=sampler)
    if not wish.subject:
        raise UserError("choose at least one class")
    labels = np.repeat(np.asarray(wish.subject, np.int32), wish.pictures).tolist()
    return model.sample_steps(labels, wish.seed, every=max(1, model.config.num_steps // PREVIEWS), sampler=sampler)


def captions(model: Drawer, wish: Wish) -> list[str | None]:
    """What is written below each picture: its class."""
    if isinstance(model, TextToImage):
        return [None] * wish.pictures
    return [model.class_names[int(label)] for label in wish.subject for _ in range(wish.pictures)]


def make_page(gradio: Any, model: Drawer, name: str) -> Any:
    """The page, a `gradio.Blocks`, that draws with a model."""
    turn = threading.Lock()

    def on_draw(*fields: Any) -> Iterator[tuple[Any, str]]:
        """What the gallery and the line above it show."""
        yield gradio.skip(), "starting; the first pictures of a kind wait until the model is compiled"
        wish = Wish(*fields)
        try:
            # When one drawing is stopped, Gradio begins the next even while a patch of it is still computed.
            with turn, tempfile.TemporaryDirectory() as folder:
                start = time.monotonic()
                for drawn, patches, pictures in draw(model, wish):
                    last = drawn == patches
                    shown = list(zip(_save(folder, wish.seed, pictures) if last else pictures, captions(model, wish), strict=True))
                    status = f"{'done' if last else 'drawing'}: {drawn} of {patches} patches, {time.monotonic() - start:.1f} s"
                    # At first a single picture is opened, which makes it as large as the gallery; later that is up to the visitor.
                    yield gradio.Gallery(shown, selected_index=0 if len(shown) == 1 else None) if drawn == 1 else shown, status
        except Exception as error:
            complaint = str(error)
            if not isinstance(error, UserError):  # one of XLA, say, whose memory is full: the next drawing may be a smaller one
                logging.exception("a drawing failed")
                complaint = type(error).__name__ + ": " + complaint.partition("\n")[0]
            gradio.Warning(complaint)
            yield gradio.skip(), complaint

    with gradio.Blocks(title=f"BitDance: {name}", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown(f"## BitDance: {name}")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=300):
                inputs = _inputs(gradio, model)
            with gradio.Column(scale=2):
                with gradio.Row():
                    start = gradio.Button("Draw", variant="primary", scale=2, min_width=100, elem_id="draw")
                    stop = gradio.Button("Stop", variant="stop", scale=1, min_width=100, elem_id="stop")
                status = gradio.Textbox(show_label=False, interactive=False, container=False, elem_id="status")
                pictures = gradio.Gallery(
                    show_label=False,
                    height=640,
                    object_fit="contain",
                    format="jpeg" if isinstance(model, TextToImage) else "png",
                    interactive=False,
                    buttons=["download", "download_all", "fullscreen"],
                    elem_id="pictures",
                )
        # One event for all visitors together: the queue starts a drawing when the one before has ended.
        drawing = start.click(on_draw, inputs, [pictures, status], concurrency_limit=1, show_progress="minimal", show_progress_on=status)
        stop.click(None, cancels=[drawing])
        # After its last event, in the browser: nothing of the drawing can come later and take the word back.
        drawing.then(None, status, status, js="text => text.replace(/^(starting.*|drawing)/, 'stopped')")
    return page


def _save(folder: str, seed: int, pictures: np.ndarray) -> list[str]:
    """PNG files, whose names a browser keeps when it saves them."""
    paths = [os.path.join(folder, f"seed-{seed}-{number:02d}.png") for number in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        save_png(path, picture)
    return paths


def _inputs(gradio: Any, model: Drawer) -> list[Any]:
    """The fields of a `Wish`."""
    if isinstance(model, TextToImage):
        subject = gradio.Textbox(label="Prompt", lines=3, placeholder=PROMPTS[0], elem_id="subject")
        gradio.Examples([[prompt] for prompt in PROMPTS], subject, label="Such as")
        size = gradio.Dropdown(SIZES, value=SIZES[0], allow_custom_value=True, label="Size (width x height)", elem_id="size")
        pictures = "Pictures"
    else:
        names = [(name, label) for label, name in enumerate(model.class_names)]
        chosen = list(range(min(9, len(names))))
        subject = gradio.Dropdown(names, value=chosen, multiselect=True, label="Classes", elem_id="subject")
        side = f"{model.config.image_size}x{model.config.image_size}"
        size = gradio.Textbox(side, label="Size (the model's own)", interactive=False, elem_id="size")
        pictures = "Pictures of each class"
    count = gradio.Slider(1, 16, value=1, step=1, label=pictures, elem_id="count")
    seed = gradio.Number(0, precision=0, label="Seed", elem_id="seed")
    gradio.Button("Another seed", size="sm", elem_id="another").click(None, None, seed, js=f"() => Math.floor(Math.random() * {2**32})")
    steps = gradio.Slider(1, 200, value=model.sampler.head_steps, step=1, label="Steps of the head", elem_id="steps")
    guidance = gradio.Slider(0, 20, value=model.sampler.guidance_scale, step=0.1, label="Guidance (1: none)", elem_id="guidance")
    return [subject, size, count, seed, steps, guidance]


if __name__ == "__main__":
    sys.exit(run(main))
