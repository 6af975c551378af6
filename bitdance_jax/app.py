"""A web page that draws: `python -m bitdance_jax.app` with the embedded emoji model, `--checkpoint FOLDER` with any other.

Classes or a prompt go in; a gallery fills in while the patches are drawn. The page needs Gradio (the extra `app`) and no internet.
"""

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bitdance_jax import ClassConditionalPipeline, TextToImage, load, model_folder
from bitdance_jax.command_line import parse, run
from bitdance_jax.config import SamplerConfig
from bitdance_jax.errors import UserError
from bitdance_jax.sampling.partial import Partial
from bitdance_jax.sampling.pipeline import EMBEDDED
from bitdance_jax.sampling.text_to_image import Weights, parse_size


PREVIEWS = 16
"""How often the partly drawn pictures are shown, about."""

MAX_PICTURES = 64
"""Drawn at a time; they are one batch."""

SIZES = ("1024x1024", "1280x768", "768x1280", "512x512", "2048x512", "512x2048")
"""Proposed for text-to-image models; others can be typed."""

MAX_SEED = 2**32 - 1


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
        jax.config.update("jax_compilation_cache_dir", arguments.compilation_cache)
    page = make_page(gradio, load_drawer(arguments), os.path.basename(os.path.normpath(arguments.checkpoint)))
    try:
        page.launch(server_name=arguments.host, server_port=arguments.port, share=arguments.share, ssr_mode=False)
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
    kind = "class_conditional" if arguments.checkpoint == EMBEDDED else model_folder.read_config(arguments.checkpoint).kind
    if kind == "text_to_image":
        return TextToImage.load(arguments.checkpoint, dtype=arguments.dtype, weights=arguments.weights)
    if arguments.weights is not None:
        raise UserError(f"{arguments.checkpoint} is a {kind} model; --weights belongs to text-to-image ones")
    model = load(arguments.checkpoint, jnp.dtype(arguments.dtype or "float32"))
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
    sampler = dataclasses.replace(model.sampler, head_steps=wish.steps, guidance_scale=float(wish.guidance))
    total = wish.pictures * (1 if isinstance(wish.subject, str) else len(wish.subject))
    if total > MAX_PICTURES:
        raise UserError(f"{total} pictures are too many at a time; {MAX_PICTURES} are the most")
    if isinstance(model, TextToImage):
        return _draw_prompt(model, wish, sampler)
    if not wish.subject:
        raise UserError("choose at least one class")
    labels = np.repeat(np.asarray(wish.subject, np.int32), wish.pictures).tolist()
    return model.sample_steps(labels, wish.seed, every=_every(model.config.num_steps), sampler=sampler)


def _draw_prompt(model: TextToImage, wish: Wish, sampler: SamplerConfig) -> Iterator[Partial]:
    height, width = parse_size(wish.size)
    every = _every(height * width // model.config.size_multiple**2)
    prompt, pictures = str(wish.subject), wish.pictures
    return model.generate_steps(prompt, every=every, size=(height, width), images_per_prompt=pictures, seed=wish.seed, sampler=sampler)


def _every(patches: int) -> int:
    return max(1, patches // PREVIEWS)


def make_page(gradio: Any, model: Drawer, name: str) -> Any:
    """The page, a `gradio.Blocks`, that draws with a model."""

    def on_draw(*fields: Any) -> Iterator[tuple[Any, str]]:
        yield [], "starting; the first pictures of a kind wait until the model is compiled"
        try:
            for partial in draw(model, Wish(*fields)):
                done = "done" if partial.drawn == partial.patches else "drawing"
                yield list(partial.pictures), f"{done}: {partial.drawn} of {partial.patches} patches"
        except UserError as error:
            gradio.Warning(str(error))
            yield [], ""

    with gradio.Blocks(title=f"BitDance: {name}", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown(f"## BitDance: {name}")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=300):
                inputs = _inputs(gradio, model)
                with gradio.Row():
                    start = gradio.Button("Draw", variant="primary", min_width=100, elem_id="draw")
                    stop = gradio.Button("Stop", variant="stop", min_width=100, elem_id="stop")
            with gradio.Column(scale=2):
                status = gradio.Textbox(show_label=False, interactive=False, container=False, elem_id="status")
                pictures = gradio.Gallery(
                    label="Pictures", columns=3, height=640, object_fit="contain", format="png", interactive=False, elem_id="pictures"
                )
        # One event for all visitors together: the queue starts a drawing when the one before has ended.
        drawing = start.click(on_draw, inputs, [pictures, status], concurrency_limit=1, show_progress="hidden")
        stop.click(lambda: "stopped", None, status, cancels=[drawing], queue=False)
    return page


def _inputs(gradio: Any, model: Drawer) -> list[Any]:
    """The fields of a `Wish`."""
    if isinstance(model, TextToImage):
        subject = gradio.Textbox(label="Prompt", lines=3, placeholder="a cat on a mat", elem_id="subject")
        size = gradio.Dropdown(SIZES, value=SIZES[0], allow_custom_value=True, label="Size (width x height)", elem_id="size")
        pictures = "Pictures"
    else:
        names = [(name, label) for label, name in enumerate(model.class_names)]
        chosen = list(range(min(9, len(names))))
        subject = gradio.Dropdown(names, value=chosen, multiselect=True, label="Classes", elem_id="subject")
        side = f"{model.config.image_size}x{model.config.image_size}"
        size = gradio.Textbox(side, label="Size (the model's own)", interactive=False, elem_id="size")
        pictures = "Pictures of each class"
    return [
        subject,
        size,
        gradio.Slider(1, 16, value=1, step=1, label=pictures, elem_id="count"),
        gradio.Number(0, precision=0, minimum=0, maximum=MAX_SEED, label="Seed", elem_id="seed"),
        gradio.Slider(1, 200, value=model.sampler.head_steps, step=1, label="Steps of the head", elem_id="steps"),
        gradio.Slider(0, 20, value=model.sampler.guidance_scale, step=0.1, label="Guidance (1: none)", elem_id="guidance"),
    ]


if __name__ == "__main__":
    sys.exit(run(main))
