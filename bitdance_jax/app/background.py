"""An iterator that works in a thread while the event loop answers others."""

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any, TypeVar


T = TypeVar("T")
_END = object()


async def in_thread(
    make: Callable[[], Generator[T, None, None]], turn: threading.Lock
) -> AsyncIterator[T]:
    """The items of `make()`, each computed when it is asked for, in a thread that holds `turn` from the first to the last.

    It can be left at any moment: nobody waits for the item at hand, after which the thread closes the iterator and gives its turn back.
    """
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[Any] = asyncio.Queue()
    wanted, left = threading.Event(), threading.Event()

    def put(item: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(items.put_nowait, item)

    def work() -> None:
        while not turn.acquire(timeout=0.1):
            if left.is_set():
                return
        try:
            iterator = make()
            while not left.is_set():
                put(next(iterator, _END))
                wanted.wait()
                wanted.clear()
            iterator.close()
        except Exception as error:
            put(error)
        finally:
            turn.release()

    threading.Thread(
        target=contextvars.copy_context().run, args=(work,), name="in_thread", daemon=True
    ).start()
    try:
        while (item := await items.get()) is not _END:
            if isinstance(item, Exception):
                raise item
            yield item
            wanted.set()
    finally:
        left.set()
        wanted.set()
