"""The queue of the HTTP API."""

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable, Generator
from typing import TypeVar

from bitdance_jax.app.api_errors import ApiError
from bitdance_jax.app.background import in_thread


T = TypeVar("T")


class Queue:
    """Samples one request at a time, in the order of their arrival, while a few others wait."""

    def __init__(self, waiting: int) -> None:
        self._places = waiting + 1
        self._turn = asyncio.Lock()
        # A request that was left ends with the patches in progress; until then this is locked.
        self._lock = threading.Lock()
        self._seconds = 1.0
        self.requests = 0

    async def last(self, make: Callable[[], Generator[T, None, None]]) -> T:
        """The last item of `make()`, which runs in a thread; cancellation frees the place.

        Raises:
          ApiError: as many requests wait as can. Retry-After is the time that the last one took.
        """
        if self.requests >= self._places:
            seconds = str(math.ceil(self._seconds))
            raise ApiError(
                429,
                f"the queue is full; try again in {seconds} s",
                code="rate_limit_exceeded",
                headers={"Retry-After": seconds},
            )
        self.requests += 1
        try:
            async with self._turn:
                start = time.monotonic()
                async with contextlib.aclosing(in_thread(make, self._lock)) as items:
                    async for item in items:
                        last = item
                self._seconds = time.monotonic() - start
                return last
        finally:
            self.requests -= 1
