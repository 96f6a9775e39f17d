"""Ctrl-C and SIGTERM: training and testing end between two batches, so that whatever writes files is left in order."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

EXIT_TERMINATED = 143  # 128 and the number of SIGTERM, as a shell has it


def terminate(number: int, frame: FrameType | None) -> None:
    """A handler of SIGTERM that ends the process as an exception does."""
    raise SystemExit(EXIT_TERMINATED)


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end this process as an exception does, so that it can say how to continue and end what it has started."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


_REPLACED = {signal.SIGINT: (signal.default_int_handler,), signal.SIGTERM: (signal.SIG_DFL, terminate)}


class Interrupts(Callback):
    """Raises KeyboardInterrupt before the next batch after a Ctrl-C, SystemExit after SIGTERM; a second one does not wait.

    Python would raise them wherever the main thread is. In the queue of TensorBoard's writer that loses a wake-up, and closing
    the file then waits for two minutes.
    """

    def __init__(self) -> None:
        self._asked: int | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Around training or testing. Ctrl-C leaves it as what it is: Lightning turns it into SystemExit and leaves the signal
        ignored. So does SIGTERM, of which Lightning makes an exit with status 0.
        """
        in_main_thread = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in _REPLACED} if in_main_thread else {}
        for number, handler in before.items():
            if handler in _REPLACED[number]:  # another is the user's affair
                signal.signal(number, self._ask)
        try:
            yield
            self._raise_if_asked()  # after the last batch
        except SystemExit as exit_:
            if isinstance(exit_.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from exit_
            if isinstance(exit_, SIGTERMException):  # raised by Lightning's loops between two batches
                raise SystemExit(EXIT_TERMINATED) from exit_
            raise
        finally:
            for number, handler in before.items():
                if handler is not None:  # one that is not Python's cannot be put back, and was not replaced
                    signal.signal(number, handler)

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        self._raise_if_asked()

    @override
    def on_validation_batch_start(self, *_: Any) -> None:
        self._raise_if_asked()

    @override
    def on_test_batch_start(self, *_: Any) -> None:
        self._raise_if_asked()

    def _ask(self, number: int, _: FrameType | None) -> None:
        self._raise_if_asked()
        self._asked = number

    def _raise_if_asked(self) -> None:
        if self._asked == signal.SIGTERM:
            raise SystemExit(EXIT_TERMINATED)
        if self._asked is not None:
            raise KeyboardInterrupt
