"""Looking on at the steps of an optimizer: what `blaq.zigzag` is built on."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class StepObserver(Protocol):
    """What ``opt.observers`` holds: told of all that changes the weights, of every step in both its forms (`step`, and the two
    halves). A step that is skipped or undone before is not told. An observer reads, and changes nothing.
    """

    def before_update(self, first: Mapping[Tensor, Tensor] | None) -> None:
        """The gradients are there and the latent weights as before the step.

        Args:
            first: the gradients at the current point, in a step with two; those at the trial point are then in ``p.grad``,
                and the quantized parameters hold the trial point. None in a step with one gradient, in ``p.grad``.
        """

    def after_update(self) -> None:
        """The step is done and counted."""

    def after_adoption(self, before: Mapping[Tensor, Tensor]) -> None:
        """`adopt_weights` has taken weights from outside.

        Args:
            before: the latent weights of those parameters, as they were.
        """
