"""An action for a block of code that takes too long."""

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def run_after(seconds: int | float, action: Callable[[], None]) -> Iterator[None]:
    """Runs `action` once, in a thread, if the block has not ended after so many seconds."""
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
