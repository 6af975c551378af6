"""Work in a thread that can be left at any moment."""

import asyncio
import threading

import pytest

from bitdance_jax.app.background import in_thread


def test_each_item_is_computed_when_it_is_asked_for():
    turn, computed = threading.Lock(), []

    def work():
        for number in range(3):
            computed.append(number)
            yield number

    async def consume():
        async for number in in_thread(work, turn):
            await asyncio.sleep(0.02)
            assert computed == list(range(number + 1))

    asyncio.run(consume())
    assert computed == [0, 1, 2] and turn.acquire(timeout=5)


def test_an_error_is_the_consumers():
    turn = threading.Lock()

    def work():
        yield 1
        raise ValueError("no")

    async def consume():
        return [item async for item in in_thread(work, turn)]

    with pytest.raises(ValueError, match=r"^no$"):
        asyncio.run(consume())
    assert turn.acquire(timeout=5)


def test_leaving_does_not_wait_for_the_item_at_hand():
    turn, compiling, compiled, closed = (
        threading.Lock(),
        threading.Event(),
        threading.Event(),
        threading.Event(),
    )

    def work():
        try:
            compiling.set()
            compiled.wait()
            yield 1
            raise AssertionError("still running")
        finally:
            closed.set()

    async def leave():
        first = asyncio.ensure_future(anext(in_thread(work, turn)))
        second = asyncio.ensure_future(anext(in_thread(work, turn)))
        await asyncio.to_thread(compiling.wait)
        for task in (first, second):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, 1)
        assert turn.locked() and not closed.is_set()

    asyncio.run(leave())
    compiled.set()
    assert closed.wait(5) and turn.acquire(timeout=5)
