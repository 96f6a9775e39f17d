"""Ctrl-C and SIGTERM during training wait for the batch under way, and no longer."""

import signal
from collections.abc import Callable, Iterator

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from blaq.train.interrupts import EXIT_TERMINATED, Interrupts, terminable


@pytest.fixture(autouse=True)
def pythons_own_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(*then: Callable[[], object], interrupts: Interrupts) -> list[int]:
    """Which of some calls were made before a training ended as interrupted."""
    made: list[int] = []

    def training() -> None:
        with interrupts.handled():
            for i, call in enumerate(then):
                call()
                made.append(i)

    with pytest.raises(KeyboardInterrupt):
        training()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return made


def ctrl_c() -> None:
    """What Python calls then: a signal itself would also be one to whatever else runs in this process."""
    handler = signal.getsignal(signal.SIGINT)
    assert callable(handler)
    handler(signal.SIGINT, None)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_batch_start", "on_test_batch_start"])
def test_the_batch_is_finished_first(hook: str) -> None:
    interrupts = Interrupts()
    batch = getattr(interrupts, hook)
    assert interrupted(batch, ctrl_c, batch, batch, interrupts=interrupts) == [0, 1]


def test_after_the_last_batch() -> None:
    assert interrupted(ctrl_c, interrupts=Interrupts()) == [0]


def test_a_second_one_does_not_wait() -> None:
    assert interrupted(ctrl_c, ctrl_c, interrupts=Interrupts()) == [0]


def test_termination_waits_for_the_batch_and_has_a_status() -> None:
    interrupts, made = Interrupts(), []

    def training() -> None:
        with terminable(), interrupts.handled():
            interrupts.on_train_batch_start()
            handler = signal.getsignal(signal.SIGTERM)
            assert callable(handler)
            handler(signal.SIGTERM, None)
            made.append(1)
            interrupts.on_train_batch_start()
            made.append(2)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit_:
        training()
    assert (exit_.value.code, made) == (EXIT_TERMINATED, [1])
    assert signal.getsignal(signal.SIGTERM) is before


def test_lightnings_exit_gets_a_status() -> None:
    with pytest.raises(SystemExit) as exit_, Interrupts().handled():
        raise SIGTERMException
    assert exit_.value.code == EXIT_TERMINATED


def test_a_handler_of_the_user_is_left() -> None:
    seen = []
    signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    with Interrupts().handled():
        ctrl_c()
    assert seen == [1]
