"""Ctrl-C while a network is trained or tested: it ends between two batches, so that whatever writes files is left in order."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning.pytorch import Callback
from typing_extensions import override


class Interrupts(Callback):
    """Raises KeyboardInterrupt before the next batch after a Ctrl-C; a second Ctrl-C does not wait for it.

    Python would raise it wherever the main thread is. In the queue of TensorBoard's writer that loses a wake-up, and closing
    the file then waits for two minutes.
    """

    def __init__(self) -> None:
        self._asked = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Around training or testing. Ctrl-C leaves it as what it is: Lightning turns it into SystemExit and leaves the signal
        ignored.
        """
        in_main_thread = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGINT)
        if in_main_thread and handler is signal.default_int_handler:  # another is the user's affair
            signal.signal(signal.SIGINT, self._ask)
        try:
            yield
            self._raise_if_asked()  # after the last batch
        except SystemExit as exit_:
            if isinstance(exit_.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from exit_
            raise
        finally:
            if in_main_thread:
                signal.signal(signal.SIGINT, handler)

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        self._raise_if_asked()

    @override
    def on_validation_batch_start(self, *_: Any) -> None:
        self._raise_if_asked()

    @override
    def on_test_batch_start(self, *_: Any) -> None:
        self._raise_if_asked()

    def _ask(self, _: int, __: FrameType | None) -> None:
        self._raise_if_asked()
        self._asked = True

    def _raise_if_asked(self) -> None:
        if self._asked:
            raise KeyboardInterrupt
