"""The input fields of the web page, in the order of `generation.Request`."""

from collections.abc import Callable
from typing import Any

from bitdance_jax.data.emoji import EXAMPLES
from bitdance_jax.io.model_lookup import EMBEDDED
from bitdance_jax.pipelines.pipeline import Pipeline


MAX_IMAGES = 64
"""Images generated at a time, in one batch."""

SIZES = ("1024x1024", "1280x768", "768x1280", "512x512", "2048x512", "512x2048")
"""Suggestions for released text-to-image models; the visitor may type others."""

PROMPTS = (
    "a red fox in fresh snow, watercolour",
    "a lighthouse on a cliff at dusk, long exposure",
    "一只橘猫在窗台上看雨",
)
"""Suggestions, like the sizes."""


def make_inputs(gradio: Any, model: Pipeline) -> list[Any]:
    """The fields: subject, size, images, seed, steps, guidance."""
    is_text_to_image = model.kind == "text_to_image"
    first = _prompt_inputs(gradio, model) if is_text_to_image else _class_inputs(gradio, model)
    seed = gradio.Number(
        0,
        precision=0,
        label="Seed",
        info="The same number generates the same images.",
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
        info="Of the diffusion of each patch: more are finer and slower.",
        elem_id="steps",
    )
    guidance = gradio.Slider(
        0,
        20,
        value=model.sampler.guidance_scale,
        step=0.1,
        label="Guidance",
        info="More follows the prompt or class closer, with less variety; 1 is none.",
        elem_id="guidance",
    )
    return [*first, seed, steps, guidance]


def _prompt_inputs(gradio: Any, model: Pipeline) -> list[Any]:
    prompts = EXAMPLES if model.name == EMBEDDED else PROMPTS
    own_size = _own_size(model)
    subject = gradio.Textbox(
        label="Prompt",
        info="What the images show, in words.",
        lines=3,
        placeholder=prompts[0],
        elem_id="subject",
    )
    gradio.Examples([[prompt] for prompt in prompts], subject, label="Examples")
    size = gradio.Dropdown(
        SIZES if own_size in SIZES else (own_size,),
        value=own_size,
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
        info="Of the prompt, generated together.",
        elem_id="count",
    )
    return [subject, size, count]


def _class_inputs(gradio: Any, model: Pipeline) -> list[Any]:
    names = [(name, label) for label, name in enumerate(model.class_names)]
    chosen = list(range(min(9, len(names))))
    subject = gradio.Dropdown(
        names,
        value=chosen,
        multiselect=True,
        max_choices=MAX_IMAGES,
        label="Classes",
        info="What the images show; type to search.",
        elem_id="subject",
    )
    size = gradio.Textbox(
        _own_size(model),
        label="Size",
        info="The model's own.",
        interactive=False,
        elem_id="size",
    )
    count = gradio.Slider(
        1,
        max_per_class(len(chosen)),
        value=1,
        step=1,
        label="Images of each class",
        info=f"At most {MAX_IMAGES} of all classes together.",
        elem_id="count",
    )
    subject.change(_limit(gradio), [subject, count], count, queue=False, show_progress="hidden")
    return [subject, size, count]


def _own_size(model: Pipeline) -> str:
    height, width = model.default_size
    return f"{width}x{height}"


def max_per_class(classes: int) -> int:
    """The most images of each class that fit into a batch."""
    return max(1, MAX_IMAGES // max(classes, 1))


def _limit(gradio: Any) -> Callable[[list[int], int], Any]:
    """Limits the images of each class when the chosen classes change."""

    def limit(chosen: list[int], count: int) -> Any:
        most = max_per_class(len(chosen))
        return gradio.Slider(maximum=most, value=min(count, most))

    return limit
