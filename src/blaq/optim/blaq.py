"""BLAQ: loss-aware quantization with one step forward and backtrack, as a torch optimizer."""

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import ParamsT

from blaq.optim import compiled, steps
from blaq.optim.batches import Entry
from blaq.optim.halves import TwoHalves
from blaq.optim.options import REMEMBERING

Closure = Callable[[], Any]

_NEEDS_CLOSURE = """{owner}.step(): trial='fresh' looks at a second gradient and needs a closure:

    def closure():
        optimizer.zero_grad()
        loss = loss_function(model(inputs), targets)
        loss.backward()
        return loss

    optimizer.step(closure)

or call forward_step() and backtrack_step() around passes of your own, or take one gradient: trial='past' or 'none'."""


class BLAQ(TwoHalves):
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
    parameters are at least float32; those of small ones, and every ``step``, come to share a memory (safetensors wants clones).
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
        self._cleared = False  # whether the evaluation under way has begun with `zero_grad`
        self._second_view = SimpleNamespace(param_groups=[])  # how a GradScaler sees the second evaluation

    @compiled.untraced
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
