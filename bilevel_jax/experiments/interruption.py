"""Signals that end a run. They take effect between two calls of the device, never inside one."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptionError(Exception):
    """A run that a signal ended, after its state was kept. `status`: the exit status of the process."""

    def __init__(self, number: int):
        super().__init__(f"signal {number}")
        self.status = 128 + number


class Stop:
    """Whether a signal has come, and which."""

    number: int | None = None

    def check(self) -> None:
        """Raise InterruptionError if a signal has come."""
        if self.number is not None:
            raise InterruptionError(self.number)


_noticing: list[Stop] = []  # the `Stop` of the outermost context, while there is one


@contextlib.contextmanager
def noticed(again: Any = None) -> Iterator[Stop]:
    """In this context SIGINT and SIGTERM only set the `Stop`. A context within another one has the same `Stop`.

    Python raises KeyboardInterrupt wherever it happens to be, in JAX's callbacks too, where it is lost, or ends the
    process in a segmentation fault. Outside of the main thread no signal arrives, and none is caught.

    Args:
      again: the handler of a second signal of a kind; None is the one of before, which in Python raises
        KeyboardInterrupt. `signal.SIG_DFL` ends the process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Stop()
        return
    if _noticing:
        yield _noticing[0]
        return
    stop = Stop()

    def notice(number, frame):
        del frame
        stop.number = number
        signal.signal(number, before[number] if again is None else again)

    before = {number: signal.signal(number, notice) for number in SIGNALS}
    _noticing.append(stop)
    try:
        yield stop
    finally:
        _noticing.remove(stop)
        for number, handler in before.items():
            signal.signal(number, handler)
