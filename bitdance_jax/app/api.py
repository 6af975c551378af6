"""The HTTP API: image generation as OpenAI's clients ask for it, from one model.

`docs/api_server.md` describes it to those who call it.
"""

import asyncio
import base64
import hmac
import secrets
import time
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bitdance_jax.app.api_errors import HANDLERS, ApiError
from bitdance_jax.app.generation import Request, failure, generate, options
from bitdance_jax.app.page_guard import Receive, Scope, Send
from bitdance_jax.app.request_queue import Queue
from bitdance_jax.errors import UserError
from bitdance_jax.io.image_files import png_bytes
from bitdance_jax.io.readers import decode_json
from bitdance_jax.pipelines.checks import parse_size
from bitdance_jax.pipelines.class_conditional import ClassConditionalPipeline
from bitdance_jax.pipelines.partial_images import Partial
from bitdance_jax.pipelines.pipeline import Pipeline


T = TypeVar("T")

STOPS = 4
"""About how often sampling can stop for a client that has gone; each time decodes the images."""


@dataclass(frozen=True)
class Limits:
    """Of a server.

    Attributes:
      queue: requests that wait while one is sampled.
      images: of a request.
      pixels: of an image.
      head_steps: of a request.
    """

    queue: int = 8
    images: int = 10
    pixels: int = 2**20
    head_steps: int = 200


class ImageRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of POST /v1/images/generations; null is the same as no field.

    The last fields are some that OpenAI's clients send, and that change nothing here.
    """

    prompt: str
    model: str | None = None
    n: int | None = None
    size: str | None = None
    response_format: str | None = None
    seed: int | None = None
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    head_steps: int | None = None
    sampler: str | None = None
    output_format: Literal["png"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: str | None = None
    quality: str | None = None
    style: str | None = None
    user: str | None = None


class Key:
    """ASGI middleware that asks for the key as `Authorization: Bearer KEY`, but for /health."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            is_right = hmac.compare_digest(given.strip().encode(), self._key)
            if kind.lower() != "bearer" or not is_right:
                error = ApiError(
                    401,
                    "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Endpoints:
    """What a server answers."""

    def __init__(self, model: Pipeline, limits: Limits) -> None:
        self._model = model
        self._limits = limits
        self._queue = Queue(limits.queue)
        self._started = int(time.time())

    async def generate(self, http: HttpRequest) -> Response:
        body = await http.body()
        request, texts = await asyncio.to_thread(self._checked, body)

        def sample() -> Generator[Partial, None, None]:
            yield from generate(self._model, request, STOPS)

        try:
            partial = await _while_connected(http, self._queue.last(sample))
        except (UserError, ApiError):
            raise
        except Exception as error:
            raise ApiError(500, failure(error)) from error
        if partial is None:
            return Response(status_code=499)  # which nobody reads
        data = await asyncio.to_thread(_encoded, partial.images, texts)
        return JSONResponse(
            {
                "created": int(time.time()),
                "data": [{"b64_json": text} for text in data],
                "output_format": "png",
                "size": request.size,
                "seed": request.seed,
            }
        )

    async def models(self, http: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._description()]})

    async def model(self, http: HttpRequest) -> Response:
        self._check_model(http.path_params["name"])
        return JSONResponse(self._description())

    async def health(self, http: HttpRequest) -> Response:
        return JSONResponse({"status": "ok", "requests": self._queue.requests})

    def _description(self) -> dict[str, Any]:
        height, width = self._model.default_size
        return {
            "id": self._model.name,
            "object": "model",
            "created": self._started,
            "owned_by": "bitdance_jax",
            "kind": self._model.kind,
            "size": f"{width}x{height}",
            "class_names": list(self._model.class_names),
        }

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._model.name):
            raise ApiError(
                404,
                f"there is no model {name!r}; this server has {self._model.name!r}",
                param="model",
                code="model_not_found",
            )

    def _checked(self, body: bytes) -> tuple[Request, list[dict[str, str]]]:
        """The request, and the text chunks of its images.

        Raises:
          UserError: the body is not such a request, or the model cannot sample this.
          ApiError: the server does not.
        """
        fix = "see docs/api_server.md for the fields"
        asked: ImageRequest = decode_json(body, ImageRequest, where="the request", fix=fix)
        self._check_model(asked.model)
        if asked.response_format not in (None, "b64_json"):
            raise ApiError(
                400,
                f"response_format must be b64_json, got {asked.response_format!r}; "
                "this server stores no images that a url could name",
                param="response_format",
            )
        model = self._model
        sampler = model.sampler.named(asked.sampler)
        height, width = model.default_size
        if asked.size not in (None, "auto"):
            height, width = parse_size(asked.size)
        self._check_limits(asked, height * width)
        subject: str | list[int] = asked.prompt
        if isinstance(model, ClassConditionalPipeline):
            subject = [model.label(asked.prompt)]
        request = Request(
            subject=subject,
            size=f"{width}x{height}",
            images=1 if asked.n is None else asked.n,
            seed=secrets.randbits(32) if asked.seed is None else asked.seed,
            steps=sampler.head_steps if asked.head_steps is None else asked.head_steps,
            guidance=(
                sampler.guidance_scale if asked.guidance_scale is None else asked.guidance_scale
            ),
            negative_prompt=asked.negative_prompt or "",
            sampler=asked.sampler,
        )
        return request, model.metadata(request.subject, **options(model, request))

    def _check_limits(self, asked: ImageRequest, pixels: int) -> None:
        limits = self._limits
        steps = max(limits.head_steps, self._model.sampler.head_steps)
        for name, value, most in (
            ("n", asked.n, limits.images),
            ("head_steps", asked.head_steps, steps),
        ):
            if value is not None and not 1 <= value <= most:
                raise ApiError(400, f"{name} must be from 1 to {most}, got {value}", param=name)
        if asked.size is not None and pixels > limits.pixels:
            raise ApiError(
                400,
                f"size must have at most {limits.pixels:,} pixels, got {asked.size}",
                param="size",
            )


async def _while_connected(http: HttpRequest, work: Awaitable[T]) -> T | None:
    """What is awaited, or None once the client has gone; then the work is cancelled."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _encoded(images: np.ndarray, texts: list[dict[str, str]]) -> list[str]:
    return [
        base64.b64encode(png_bytes(image, text=text)).decode()
        for image, text in zip(images, texts, strict=True)
    ]


def make_api(model: Pipeline, limits: Limits = Limits(), key: str | None = None) -> Starlette:
    """The API of a model, an ASGI application; with a key it asks for it."""
    endpoints = Endpoints(model, limits)
    return Starlette(
        routes=[
            Route("/v1/images/generations", endpoints.generate, methods=["POST"]),
            Route("/v1/models", endpoints.models),
            Route("/v1/models/{name:path}", endpoints.model),
            Route("/health", endpoints.health),
        ],
        middleware=[] if key is None else [Middleware(Key, key=key)],
        exception_handlers=HANDLERS,
    )
