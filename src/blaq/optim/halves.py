"""A step in two halves: to the trial point, and from the gradients there back and on.

`TwoHalves` is for loops that own their forward and backward passes; `blaq.optim.blaq` makes steps of closures from it.
A loop may be compiled: steps are left out of what torch.compile traces, as torch leaves out its own optimizers' state.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from blaq.optim import compiled, steps
from blaq.optim.base import LatentOptimizer
from blaq.optim.batches import Entry
from blaq.optim.finite import Brought, all_usable, refuse_float16, refuse_sparse
from blaq.optim.trial import Evaluations, Snapshot


@dataclass(slots=True)
class _Pending:
    """Between the two halves of a step: what backtracking needs."""

    gradients: dict[Tensor, Tensor]  # g_t
    versions: dict[Tensor, int]  # of its tensors
    floats: dict[Tensor, Tensor]  # parameters without a grid, as they were
    scales: dict[Tensor, Tensor]  # of the trial point
    after_first: Snapshot


def _kept(gradient: Tensor) -> Tensor:
    """The gradient, for later: the tensor itself, unless other code may write into its memory (DDP's buckets are shared)."""
    own = gradient.untyped_storage().nbytes() == gradient.numel() * gradient.element_size()
    return gradient if own and not gradient._is_view() else gradient.clone()


class TwoHalves(LatentOptimizer):
    """Base of `BLAQ`: the passes of a step with a trial are the caller's, with `evaluation` around each."""

    def _reset_transient(self) -> None:
        super()._reset_transient()
        self._evaluations = Evaluations()
        self._pending: _Pending | None = None

    @compiled.untraced
    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Around a forward and backward pass, in loops that own their passes::

            opt.zero_grad()
            with opt.evaluation():
                loss_function(model(inputs), targets).backward()
            opt.forward_step()
            opt.zero_grad()
            with opt.evaluation():
                loss_function(model(inputs), targets).backward()
            opt.backtrack_step()

        The second pass draws the same dropout masks as the first. An exception in either undoes the whole step. Where gradients
        are accumulated every mini-batch has an `evaluation` of its own, in the same order before both halves. A loop that
        skips a mini-batch after its first evaluation calls `abandon_step`.
        """
        if self._pending is None:
            self._evaluations.first(self.module, self._devices())
        else:
            self._evaluations.again()
        try:
            with torch.enable_grad():
                yield
        except BaseException as error:
            stale = ("backward through the graph a second time", "modified by an inplace operation")
            if self._pending is not None and any(sign in str(error) for sign in stale):
                error.add_note(
                    f"{self._owner}: the closure runs twice a step; it must compute the forward pass each time."
                )
            self.abandon_step()
            raise

    @compiled.untraced
    @torch.no_grad()
    def forward_step(self) -> None:
        """First half of a two-gradient step: from the gradients in ``p.grad`` to the trial point. Then clear the gradients,
        and compute them there on the same mini-batch.

        Raises:
            ValueError: a gradient that is NaN or Inf; a step already begun; ``trial`` other than ``"fresh"``; an option
                edited to what it cannot be.
        """
        if self.trial != "fresh":
            raise ValueError(
                f"{self._owner}.forward_step(): trial={self.trial!r} takes one gradient; use trial='fresh'."
            )
        if self._pending is not None:
            raise ValueError(f"{self._owner}.forward_step(): already at the trial point; call backtrack_step() first.")
        self._run_half(self._forward)

    @compiled.untraced
    @torch.no_grad()
    def backtrack_step(self) -> None:
        """Second half: from the gradients at the trial point, in ``p.grad``, back and on with the blend of both.

        Raises:
            ValueError: no step begun; a gradient that is NaN or Inf, or missing, or an option edited to what it cannot be:
                the step is then undone.
        """
        if self._pending is None:
            raise ValueError(f"{self._owner}.backtrack_step(): no step begun; call forward_step() first.")
        self._run_half(self._backtrack)
        self._opt_called = True  # a scheduler looks for it, to warn when no step came before its own

    @compiled.untraced
    @torch.no_grad()
    def abandon_step(self) -> None:
        """Undo a step that is under way: parameters, buffers and random state as before it. Harmless otherwise."""
        pending, self._pending = self._pending, None
        if pending is not None:
            for group, p, state in self._parameters():
                if p in pending.floats:
                    p.copy_(pending.floats[p])
                elif p in pending.gradients:
                    self._hold_latent(p, state, group)
        self._evaluations.undo(pending.after_first if pending is not None else None)
        if pending is not None:
            torch.clear_autocast_cache()  # it holds casts of the trial point

    def _run_half(self, half: Callable[[list[Entry]], None]) -> None:
        try:
            self._edits.check(self._owner, self.param_groups)
            entries = self._with_gradients()
            self._gradients_usable(entries, None, self)
            half(entries)
        except BaseException:
            self.abandon_step()
            raise

    def _forward(self, entries: list[Entry]) -> None:
        self._check_untouched()
        pending = self._pending = _Pending({}, {}, {}, {}, Snapshot.take(self.module, self._devices()))
        for batch in self._kept.of(entries, self.compiles):
            pending.gradients.update(zip(batch.parameters, map(_kept, batch.gradients), strict=True))
            pending.versions.update((p, pending.gradients[p]._version) for p in batch.parameters)
            if batch.group["grid"] is None:
                pending.floats.update((p, p.clone()) for p in batch.parameters)
            scales = steps.to_trial_point(batch)
            pending.scales.update(zip(batch.parameters, scales, strict=False))  # none without a grid
            self._written.note_step(batch, self.trial)
        self._kept.release()
        for p in pending.gradients:
            p.grad = None  # it is kept; what comes next is the gradient at the trial point
        torch.clear_autocast_cache()  # it holds casts of the weights as they were

    def _backtrack(self, entries: list[Entry]) -> None:
        pending = self._pending
        assert pending is not None
        second = {p for _, p, _, _ in entries}
        if second != set(pending.gradients):
            names = ", ".join(f"'{self._name(p)}'" for p in second ^ set(pending.gradients))
            raise ValueError(f"{self._owner}: only one of the two evaluations gave a gradient to {names}; both must.")
        for p, gradient in pending.gradients.items():
            if gradient._version != pending.versions[p]:
                raise ValueError(
                    f"{self._owner}: the first gradient of '{self._name(p)}' was written to during the second evaluation, so "
                    "it is lost; let every evaluation make gradients of its own: zero_grad(), and no buffers set as p.grad."
                )
        self._evaluations.check(self._owner)
        for p, values in pending.floats.items():
            p.copy_(values)
        self._tell_observers(pending.gradients)
        self._pending = None
        self._evaluations.forget()
        pending.after_first.restore()
        try:
            for batch in self._kept.of(entries, self.compiles):
                first = [pending.gradients[p] for p in batch.parameters]
                steps.advance(batch, first, batch.gradients)
                self._written.note_step(batch, self.trial)
        except BaseException:  # batches that have not been stepped hold the trial point
            for group, p, state in self._parameters():
                if group["grid"] is not None and p in pending.gradients:
                    self._hold_latent(p, state, group)
            raise
        self._kept.count(remember=False)
        self._count(2)

    # --- what the parameters hold -------------------------------------------------------------------------------------

    def _scale_held(self, p: Tensor) -> Tensor:
        trial = self._pending.scales.get(p) if self._pending is not None else None
        return super()._scale_held(p) if trial is None else trial

    @property
    def in_trial(self) -> bool:
        """Whether the step under way is at its trial point: mute logging and counting there."""
        return self._pending is not None

    # --- internals ----------------------------------------------------------------------------------------------------

    def _tell_observers(self, first: dict[Tensor, Tensor] | None) -> None:
        for observer in self.observers:
            observer.before_update(first)

    def _gradients_usable(self, given: list[Entry], scaler: GradScaler | None, view: Any) -> bool:
        """Unscale the gradients and look for NaN and Inf: False to skip the step, an error where no scaler expects them."""
        entries = [Brought(p, grad, self._written.proof(p, state)) for _, p, grad, state in given]
        refuse_sparse(self._owner, entries, self._name)
        found_inf: Tensor | None = getattr(self, "found_inf", None)  # GradScaler.step() sets it around its call
        if scaler is not None:
            scaler.unscale_(view)
        elif found_inf is not None:
            if found_inf.item():  # even where gradients have been clipped since, or another process has found it
                return False
            grad_scale: Tensor | None = getattr(self, "grad_scale", None)
            if grad_scale is not None:
                refuse_float16(self._owner, entries, self._name)
                for entry in entries:
                    entry.grad.div_(grad_scale)
        return all_usable(self._owner, entries, self._name, scaled=scaler is not None)

    def _check_idle(self, what: str) -> None:
        if self._pending is not None:
            raise ValueError(
                f"{self._owner}.{what}: a step is under way at its trial point; call backtrack_step(), or abandon_step()."
            )
