"""An iterator whose items are computed in a thread while the event loop serves others."""

import asyncio
import contextvars
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any, TypeVar


T = TypeVar("T")
_END = object()


async def in_thread(
    make: Callable[[], Generator[T, None, None]], lock: threading.Lock
) -> AsyncGenerator[T, None]:
    """The items of `make()`, each computed on request in a thread that holds the lock throughout.

    The caller may stop at any moment without waiting for the current item; after that item the
    thread closes the iterator and releases the lock.
    """
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[Any] = asyncio.Queue()
    requested = threading.Event()
    stopped = threading.Event()

    def put(item: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(items.put_nowait, item)

    def work() -> None:
        while not lock.acquire(timeout=0.1):
            if stopped.is_set():
                return
        try:
            iterator = make()
            while not stopped.is_set():
                put(next(iterator, _END))
                requested.wait()
                requested.clear()
            iterator.close()
        except Exception as error:
            put(error)
        finally:
            lock.release()

    threading.Thread(
        target=contextvars.copy_context().run, args=(work,), name="in_thread", daemon=True
    ).start()
    try:
        while (item := await items.get()) is not _END:
            if isinstance(item, Exception):
                raise item
            yield item
            requested.set()
    finally:
        stopped.set()
        requested.set()
