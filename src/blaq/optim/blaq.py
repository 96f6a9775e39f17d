"""BLAQ: loss-aware quantization with one step forward and backtrack, as a torch optimizer."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import ParamsT

from blaq.optim import steps
from blaq.optim.base import LatentOptimizer
from blaq.optim.batches import Entry
from blaq.optim.finite import Brought, all_usable, refuse_float16, refuse_sparse
from blaq.optim.options import REMEMBERING
from blaq.optim.trial import Evaluations, Snapshot

Closure = Callable[[], Any]

_NEEDS_CLOSURE = """{owner}.step(): trial='fresh' looks at a second gradient and needs a closure:

    def closure():
        optimizer.zero_grad()
        loss = loss_function(model(inputs), targets)
        loss.backward()
        return loss

    optimizer.step(closure)

or call forward_step() and backtrack_step() around passes of your own, or take one gradient: trial='past' or 'none'."""


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


class BLAQ(LatentOptimizer):
    r"""Loss-aware quantization with one step forward and backtrack.

    ::

        forward    m_t = b1 m + (1-b1) g        v_t = b2 v + (1-b2) g^2       d_t = sqrt(v_t_hat) + eps
                   w*  = w - lr m_t_hat / d_t   g*  = gradient at P_{d_t}(w*), same mini-batch
        backtrack  v*  = b2 v + (1-b2) g*^2     d*  = sqrt(v*_hat) + eps      d'  = a d_t + (1-a) d*
                   m  <- b1 m + (1-b1) (a g + (1-a) g*)                       v  <- a v_t + (1-a) v*
                   w  <- w - lr m_hat / d'      parameter <- P_{d'}(w)

    ``P_d`` is `blaq.project`. A parameter whose group has a grid holds ``scale * level`` at all times outside `step`, from
    the construction on: a float checkpoint is loaded into the model before. Parameters without a grid follow
    `torch.optim.Adam` (`AdamW` with ``weight_decay``), with the same trial and blend.

    Args:
        params: groups of `blaq.param_groups`, or any torch form; a group may override every option but the last four.
        lr: eta > 0, a number or a tensor of one.
        betas: decay of the moments.
        eps: > 0, added to the root of the second moment.
        weight_decay: decoupled, on latent weights.
        a: weight of the gradient at the current point, 0 to 1; 1 is LAQ, 0 the extragradient step.
        curvature: the metric of the projection: ``"adam"``, d above; ``"unit"``, 1: the nearest level (BWN, TWN).
        clip: keeps the latent weights of quantized parameters in [-clip, clip].
        trial: ``"fresh"`` two gradients a step; ``"past"`` one, the previous trial gradient stands in for g, and between
            steps the parameters hold the next trial point (see `eval`); ``"delayed"`` one, no trial: a control that blends
            in the gradient of the step before, ``a g_t + (1-a) g_{t-1}``; ``"none"`` one, LAQ.
        trial_every: with ``"fresh"``, a trial at every k-th step; the other steps are LAQ's.
        compile: whether the passes over the weights are compiled (`torch.compile`); None: from 2^18 quantized weights on.
        module: the model: its buffers (BatchNorm's statistics) are left by the second evaluation as the first left them.

    State of a parameter: ``step``; ``exp_avg``, ``exp_avg_sq`` (shape of p); with a grid also ``latent`` (shape of p) and
    ``scale`` ((rows, 1), float32); with ``"past"`` and ``"delayed"`` ``trial_grad`` and ``trial_step`` (the last gradient,
    and its step); with ``"past"`` ``latent`` always, and in `eval` ``trial`` and ``trial_scale``. Tensors of quantized
    parameters are at least float32; those of small parameters come to share a memory (safetensors wants clones of them).
    In every group: ``grid``, ``granularity``, ``solver``, the options, ``steps``, ``gradient_evaluations``, ``evaluating``,
    ``format``.

    Raises:
        ValueError: an option out of range, or unknown; weights that are not finite.

    Example:
        >>> import blaq
        >>> model = torch.nn.Linear(3, 2)
        >>> opt = blaq.BLAQ(blaq.param_groups(model, bits=1), lr=0.01, module=model)
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = model(torch.ones(4, 3)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = opt.step(closure)
        >>> model.weight.abs().unique().numel(), opt.gradient_evaluations
        (1, 2)

    Source: Ma et al., AAAI 2024, equations 4 to 9 and algorithm 1 (trial); Hou and Kwok, ICLR 2018 (LAQ); Gidel et al., ICLR
    2019, section 3.3 (past).
    """

    _step_supports_amp_scaling = True  # GradScaler.step() then tells the scale instead of dividing behind our back

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        a: float = 0.7,
        *,
        trial: str = "fresh",
        trial_every: int = 1,
        curvature: str = "adam",
        clip: float | None = None,
        module: nn.Module | None = None,
        compile: bool | None = None,
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "a": a,
            "trial": trial,
            "trial_every": trial_every,
            "curvature": curvature,
            "clip": clip,
        }
        super().__init__(params, options, module, compile)

    def _reset_transient(self) -> None:
        super()._reset_transient()
        self._evaluations = Evaluations()
        self._cleared = False  # whether the evaluation under way has begun with `zero_grad`
        self._pending: _Pending | None = None
        self._second_view = SimpleNamespace(param_groups=[])  # how a GradScaler sees the second evaluation

    # --- one step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Closure | None = None, *, scaler: GradScaler | None = None) -> Any:
        """Take one step.

        Args:
            closure: clears the gradients, runs forward and backward, returns the loss. Evaluated twice when the step has a
                trial; needed then, and optional otherwise: without it the gradients in ``p.grad`` are taken.
            scaler: a `torch.amp.GradScaler`, when the closure scales the loss with it. Both gradients are unscaled; an
                overflow in either skips the step. Call ``scaler.update()`` afterwards, and never ``scaler.step(...)``.

        Returns:
            The first loss, or None without a closure.

        Raises:
            ValueError: a gradient that is NaN or Inf, by name; no closure though the step has a trial; an option edited in
                ``param_groups`` to what it cannot be. Parameters, buffers, random state and optimizer state are then as
                before the step; so they are when the closure raises.
        """
        try:
            self._edits.check(self._owner, self.param_groups)
            first = self.param_groups[0]
            two = self.trial == "fresh" and (first["steps"] + 1) % first["trial_every"] == 0
            self._check_call(closure, scaler, two)
            return self._step(closure, scaler if scaler is not None and scaler.is_enabled() else None, two)
        except BaseException:
            # GradScaler.step() leaves them behind when we raise.
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise

    def _step(self, closure: Closure | None, scaler: GradScaler | None, two: bool) -> Any:
        loss = None
        try:
            if closure is not None:
                self._evaluations.forget()  # of a batch that was skipped
                before = [(p, weakref.ref(grad)) for _, p, grad, _ in self._with_gradients()] if two else []
                self._cleared = False
                with self.evaluation():
                    loss = closure()
                self._check_not_accumulated(before)
            entries = self._with_gradients()
            if self._gradients_usable(entries, scaler, self):
                if two and closure is not None:
                    self._second_gradient(entries, closure, scaler)
                else:
                    self._one_gradient(entries)
        except BaseException:
            self.abandon_step()
            if scaler is not None:
                for view in (self, self._second_view):  # else it refuses to unscale the gradients of the next step
                    scaler._per_optimizer_states.pop(id(view), None)
            raise
        self._evaluations.forget()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See torch. A closure of a step with a trial calls it: its second evaluation has nothing to add to."""
        super().zero_grad(set_to_none)
        self._cleared = True

    def _check_not_accumulated(self, before: list[tuple[Tensor, weakref.ref[Tensor]]]) -> None:
        """Refuse gradients that were added to those of an earlier pass: the second evaluation has none to add to."""
        kept = [p for p, grad in before if p.grad is not None and p.grad is grad()]
        if kept and not self._cleared:
            raise ValueError(
                f"{self._owner}.step(): the closure leaves '{self._name(kept[0])}' the gradient it had before, to be added "
                "to, which a second evaluation cannot do again; call the optimizer's zero_grad() in the closure. To accumulate "
                "gradients over mini-batches, use evaluation(), forward_step() and backtrack_step(), or one gradient: "
                "trial='past' or 'none'."
            )

    def _second_gradient(self, first: list[Entry], closure: Closure, scaler: GradScaler | None) -> None:
        self._forward(first)
        with self.evaluation():
            closure()
        self._second_view.param_groups = self.param_groups
        entries = self._with_gradients()
        if self._gradients_usable(entries, scaler, self._second_view):
            self._backtrack(entries)
        elif self._pending is not None:  # an overflow skips the step; buffers as after any single evaluation
            after_first = self._pending.after_first
            self.abandon_step()
            after_first.restore()

    def _one_gradient(self, entries: list[Entry]) -> None:
        """A step of LAQ, of "past", or of "delayed"."""
        self._check_untouched()
        self._tell_observers(None)
        trial = self.trial
        for batch in self._kept.of(entries, self.compiles):
            try:
                steps.one_gradient(batch, trial)
            except BaseException:  # its state may have gone on, and is no longer that of the point it holds
                self._written.forget(batch.parameters)
                raise
            self._written.note_step(batch, trial)
        self._kept.count(remember=trial in REMEMBERING)
        self._count(1)

    # --- its two halves -----------------------------------------------------------------------------------------------

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
        return all_usable(self._owner, entries, self._name, scaled=scaler is not None or found_inf is not None)

    def _check_call(self, closure: Closure | None, scaler: GradScaler | None, two: bool) -> None:
        self._check_idle("step")
        if self.param_groups[0]["evaluating"]:
            raise ValueError(f"{self._owner}.step(): the parameters hold weights to evaluate; call train() first.")
        if closure is not None and getattr(self, "found_inf", None) is not None:
            raise ValueError(
                f"GradScaler.step({self._owner}, closure): a scaler unscales one gradient only, before the closure runs; call "
                "optimizer.step(closure, scaler=scaler), then scaler.update()."
            )
        if closure is None and scaler is not None:
            raise ValueError(
                f"{self._owner}.step(scaler=...): needs a closure; without one call scaler.step(optimizer)."
            )
        if closure is None and two:
            raise ValueError(_NEEDS_CLOSURE.format(owner=self._owner))

    def _check_idle(self, what: str) -> None:
        if self._pending is not None:
            raise ValueError(
                f"{self._owner}.{what}: a step is under way at its trial point; call backtrack_step(), or abandon_step()."
            )
