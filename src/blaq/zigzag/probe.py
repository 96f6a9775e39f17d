"""The probe: an observer of an optimizer that accumulates the measures on the device."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from blaq.grids import Grid
from blaq.optim.blaq import BLAQ
from blaq.optim.compiled import Codes, surroundings
from blaq.optim.options import parameter_name
from blaq.projection import widen
from blaq.zigzag.codes import direction, look_fast, seen
from blaq.zigzag.measures import TOTAL, Measures, gradient_error
from blaq.zigzag.products import Products, moved, norms, products, with_total

RATE = 0.01  # of the oscillation frequency's average, a step

_Mean = Literal["gradient_cosine", "zigzag_rate", "flip_rate", "gradient_error", "trial_agreement"]
_MEANS: tuple[_Mean, ...] = ("gradient_cosine", "zigzag_rate", "flip_rate", "gradient_error", "trial_agreement")
_OF_LAYER = ("origin", "seen", "frequency")
_OF_ALL = ("kept", "gradients", "last_start", "measured", "last_probe", "probes", "path", "sums", "counts")


class _Layer:
    """A probed parameter, and what has to be remembered of it between steps; see `ZigZag` for the bytes."""

    def __init__(self, opt: BLAQ, name: str, p: Tensor, grid: Grid | None) -> None:
        self.opt, self.name, self.p = opt, name, p
        self.grid = grid
        self.origin = widen(self.latent).clone()  # w_0
        self.seen: Tensor | None = None  # float16: codes, and in which direction they changed last
        self.frequency: Tensor | None = None  # float32
        if grid is not None:
            self.seen = seen(*self._held(), grid).view(p.shape)
            self.frequency = torch.zeros_like(self.seen, dtype=torch.float32)
        self._compiled: tuple[tuple[object, ...], list[Codes]] = ((), [])

    def compiled(self, *, counting: bool = False) -> Codes | None:
        """The compiled code of passes over the layer, and of looks that count; None where the steps are not compiled."""
        if not self.opt.compiles:
            return None
        if self._compiled[0] != surroundings():
            self._compiled = surroundings(), [Codes(), Codes()]
        return self._compiled[1][counting]

    @property
    def latent(self) -> Tensor:
        latent: Tensor = self.opt.state[self.p].get("latent", self.p)
        return latent.detach()

    def gradient_in(self, gradients: Mapping[Tensor, Tensor] | None, *, copy: bool = False) -> Tensor:
        """The gradient in a table, or without one that in ``p.grad``; zero where there is none."""
        g = self.p.grad if gradients is None else gradients.get(self.p)
        latent = self.latent
        return torch.zeros_like(latent) if g is None else g.to(latent.dtype, copy=copy)

    def _held(self) -> tuple[Tensor, Tensor]:
        """What the parameter holds, in rows, and its scales."""
        scale = self.opt.state[self.p]["scale"]
        return self.p.detach().reshape(len(scale), self.p.numel() // max(len(scale), 1)), scale

    def look_away(self) -> None:
        """Take the codes as they are, and count no change."""
        if self.grid is not None and self.seen is not None:
            self.seen = seen(*self._held(), self.grid).view(self.p.shape) + direction(self.seen)

    def look(self, rates: Tensor | None) -> Tensor:
        """Look at the codes: how many have changed since the last look. With rates, those that changed back are counted."""
        assert self.grid is not None and self.seen is not None
        values, scale = self._held()
        counting = [] if rates is None or self.frequency is None else [self.frequency.view(values.shape), rates]
        known = self.compiled(counting=bool(counting))
        return look_fast(values, scale, self.seen.view(values.shape), counting, self.grid, known)


class ZigZag:
    """Probes the steps of an optimizer: attached on construction, it looks on and changes nothing, and the device waits for
    it in `read` alone.

    Probed are the quantized parameters; where there are none, parameters of two or more dimensions. A probe at step t
    looks at the steps t - 1 and t. Codes are those that the parameters hold while training: with ``trial="past"`` of the
    trial point. There, and with "delayed", trial agreement is the gradient cosine: the previous gradient stands in for g_t.

    Memory: 10 bytes a probed weight (float32 w_0 and frequency, float16 code and direction); around a probe, and always
    with ``every=1``, 12 more (w_t, w_{t-1}, g_{t-1}).

    Args:
        opt: the optimizer, outside a step and outside `BLAQ.eval`.
        every: steps between probes, at least 1; steps are counted by the optimizer.

    Raises:
        ValueError: ``every`` out of range; an optimizer under way in a step, or in `BLAQ.eval`; nothing to probe.

    Example:
        >>> import blaq
        >>> model = torch.nn.Linear(3, 2)
        >>> opt = blaq.LAQ(blaq.param_groups(model, bits=1), lr=0.01)
        >>> zigzag = ZigZag(opt)
        >>> for _ in range(5):
        ...     opt.zero_grad()
        ...     model(torch.ones(4, 3)).sum().backward()
        ...     opt.step()
        >>> measures = zigzag.read()["total"]
        >>> round(measures.gradient_cosine, 3), measures.zigzag_rate, round(measures.path_efficiency, 3)
        (1.0, 0.0, 1.0)

    Source: Nagel et al., ICML 2022, equation 4 (oscillation frequency).
    """

    def __init__(self, opt: BLAQ, every: int = 1) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"ZigZag(every={every!r}): expected an int >= 1 (steps between probes).")
        if opt.in_trial or opt.param_groups[0]["evaluating"]:
            raise ValueError(
                "ZigZag: the optimizer is at a trial point or in eval(); finish the step, or call train()."
            )
        self.opt = opt
        self.every = every
        found = [
            (parameter_name(group, index, position), p, group["grid"])
            for index, group in enumerate(opt.param_groups)
            for position, p in enumerate(group["params"])
        ]
        self.quantized = any(grid is not None for _, _, grid in found)
        probed = [entry for entry in found if (entry[2] is not None if self.quantized else entry[1].ndim >= 2)]
        if not probed:
            raise ValueError("ZigZag: the optimizer has no quantized parameter, and none of two or more dimensions.")
        self._layers = [_Layer(opt, name, p, None if grid is None else Grid.parse(grid)) for name, p, grid in probed]
        self._device = probed[0][1].device
        self._start: list[Tensor] = []  # w_t, while step t is under way
        self._follows = False  # whether the step under way is the next after the kept one
        self._kept = -1  # the step whose gradients, and the weights that it began with, are kept
        self._gradients: list[Tensor] = []  # g_{t-1}
        self._last_start: list[Tensor] = []  # w_{t-1}
        self._measured = -1  # the last step whose length is in the path
        self._last_probe = self._steps
        self._probes = 0
        sizes = [p.numel() for _, p, _ in probed]
        self._sizes = torch.tensor([*sizes, sum(sizes)], dtype=torch.float64, device=self._device)
        rows = len(sizes) + 1
        self._path = torch.zeros(2, rows, dtype=torch.float64, device=self._device)  # length, that of its last step
        self._sums = torch.zeros(len(_MEANS), rows, dtype=torch.float64, device=self._device)
        self._counts = torch.zeros_like(self._sums)
        opt.observers.append(self)

    def detach(self) -> None:
        """Stop looking on."""
        self.opt.observers.remove(self)

    def parameters(self) -> dict[str, Tensor]:
        """The probed parameters by name."""
        return {layer.name: layer.p for layer in self._layers}

    @property
    def due(self) -> bool:
        """Whether the next step is probed."""
        return (self._steps + 1) % self.every == 0

    # --- what the optimizer calls -------------------------------------------------------------------------------------

    def before_update(self, first: Mapping[Tensor, Tensor] | None) -> None:
        """See `blaq.optim.observer.StepObserver`."""
        t = self._steps + 1
        self._start = []
        # From here until the step is done nothing is kept: it may fail.
        self._follows, self._kept = self._kept == t - 1, -1
        if self._looks_at(t):
            self._look_before(t, first)

    @torch.no_grad()
    def _look_before(self, t: int, first: Mapping[Tensor, Tensor] | None) -> None:
        probed, kept = t % self.every == 0, (t + 1) % self.every == 0
        self._start = [layer.latent.clone() for layer in self._layers]
        if not (probed or kept):
            return
        # A step with two has made its own copies.
        gradients = [layer.gradient_in(first, copy=kept and first is None) for layer in self._layers]
        if probed and self._follows:
            cosine = self._cosines(gradients, self._gradients)
            self._add("gradient_cosine", cosine)
            if first is None and self.opt.trial in ("past", "delayed"):
                self._add("trial_agreement", cosine)
        if probed and first is not None:
            self._add("trial_agreement", self._cosines(gradients, [layer.gradient_in(None) for layer in self._layers]))
        self._gradients = gradients if kept else []

    def after_update(self) -> None:
        """See `blaq.optim.observer.StepObserver`."""
        t = self._steps
        if self._looks_at(t):
            self._look_after(t)
        else:
            self._start, self._last_start, self._kept = [], [], -1

    @torch.no_grad()
    def _look_after(self, t: int) -> None:
        probed, kept = t % self.every == 0, (t + 1) % self.every == 0
        if probed or self._measured < 0:
            # Without the step before, its move is zero, and has no angle.
            last = self._last_start if self._follows else self._start
            three = zip(self._layers, last, self._start, strict=True)
            moves = Products.of(
                [moved(layer.latent, start, before, layer.compiled()) for layer, before, start in three]
            )
            self._advance_path(t, moves.lengths)
            if probed:
                cosine = moves.cosines
                self._add("zigzag_rate", torch.where(cosine.isnan(), cosine, (cosine < 0).double()))
        self._start, self._last_start = [], self._start if kept else []
        self._kept = t if kept else -1
        if self.quantized and (probed or kept):
            self._observe_codes(t, probed)
        if probed:
            self._last_probe = t
            self._probes += 1

    @torch.no_grad()
    def after_adoption(self, before: Mapping[Tensor, Tensor]) -> None:
        """See `blaq.optim.observer.StepObserver`. It is no motion: the path goes on elsewhere, and codes are looked at anew."""
        for layer in self._layers:
            if layer.p in before:
                layer.origin += widen(layer.latent) - widen(before[layer.p])
                layer.look_away()
        self._kept = -1

    def _looks_at(self, t: int) -> bool:
        """Whether step t is probed, or looked at for the next one, or the first whose length is measured."""
        return t % self.every == 0 or (t + 1) % self.every == 0 or self._measured < 0

    def _cosines(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        three = zip(self._layers, a, b, strict=True)
        return Products.of([products(x, y, layer.compiled()) for layer, x, y in three]).cosines

    def _advance_path(self, t: int, length: Tensor) -> None:
        between = t - self._measured - 1 if self._measured >= 0 else 0
        self._path[0] += length + between * (self._path[1] + length) / 2
        self._path[1] = length
        self._measured = t

    def _observe_codes(self, t: int, probed: bool) -> None:
        """Only a probed step counts; the looks before it tell in which direction a code changed last."""
        rate = 1 - (1 - RATE) ** (t - self._last_probe)
        rates = torch.tensor([1 - rate, rate], dtype=torch.float32, device=self._device) if probed else None
        changed = [layer.look(rates) for layer in self._layers]
        if probed:
            self._add("flip_rate", with_total(changed) / self._sizes)

    # --- what the user calls ------------------------------------------------------------------------------------------

    def probe_gradient_error(self, closure: Callable[[], Any]) -> None:
        """Take up `gradient_error` with a closure: before a step that is `due`, on its mini-batch."""
        errors = gradient_error(self.opt, closure)
        rows = [*(layer.name for layer in self._layers), TOTAL]
        self._add("gradient_error", torch.stack([errors[name].to(self._device) for name in rows]))

    @torch.no_grad()
    def read(self, *, reset: bool = True) -> dict[str, Measures]:
        """The measures by layer, and of all weights together as "total". Waits for the device.

        Args:
            reset: begin new means; the path and the oscillation go on.
        """
        table: dict[str, Tensor] = {
            name: sums / counts for name, sums, counts in zip(_MEANS, self._sums, self._counts, strict=True)
        }
        displacement = norms([widen(layer.latent) - layer.origin for layer in self._layers])
        table["path_efficiency"] = displacement / (self._path[0] + (self._steps - self._measured) * self._path[1])
        table["oscillation_frequency"] = torch.full_like(displacement, torch.nan)
        if self.quantized and self._probes:
            sums = [layer.frequency.sum(dtype=torch.float64) for layer in self._layers if layer.frequency is not None]
            table["oscillation_frequency"] = with_total(sums) / self._sizes
        if reset:
            self._sums.zero_()
            self._counts.zero_()
        columns = torch.stack(list(table.values()), dim=1).tolist()
        names = [*(layer.name for layer in self._layers), TOTAL]
        return {
            name: Measures(**{key: None if x != x else x for key, x in zip(table, row, strict=True)})
            for name, row in zip(names, columns, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """All that the next reading depends on: plain values and tensors, for ``weights_only=True``."""
        layers = [{key: getattr(layer, key) for key in _OF_LAYER} for layer in self._layers]
        rest = {key: getattr(self, f"_{key}") for key in _OF_ALL}
        return {"every": self.every, "names": [layer.name for layer in self._layers], "layers": layers, **rest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, with an optimizer that went on from its own.

        Raises:
            ValueError: a state of other layers, shapes or ``every``.
        """
        of_layers = [(key, layer) for layer in state.get("layers", ()) for key in _OF_LAYER]
        expected = [*((key, state) for key in _OF_ALL), *of_layers]
        if absent := list(dict.fromkeys(key for key, part in expected if key not in part)):
            raise ValueError(
                f"ZigZag.load_state_dict(): the state has no {', '.join(absent)}: it is of another version of blaq; make "
                "the run anew, or go on without the state."
            )
        names, shapes = ([layer.name for layer in self._layers], [layer.p.shape for layer in self._layers])
        theirs = [layer["origin"].shape for layer in state["layers"]]
        if (state["every"], state["names"], theirs) != (self.every, names, shapes):
            raise ValueError(
                f"ZigZag.load_state_dict(): expected a state of every={self.every} and the layers {', '.join(names)}, in their "
                f"shapes; found every={state['every']} and {', '.join(state['names'])}."
            )
        for layer, saved in zip(self._layers, state["layers"], strict=True):
            for key in _OF_LAYER:
                setattr(layer, key, _copy(saved[key], layer.p.device))
        for key in _OF_ALL:
            setattr(self, f"_{key}", _copy(state[key], self._device))

    # --- internals ----------------------------------------------------------------------------------------------------

    @property
    def _steps(self) -> int:
        return int(self.opt.param_groups[0]["steps"])

    def _add(self, mean: _Mean, values: Tensor) -> None:
        """Take up the values of a probe; NaN where a layer has none."""
        known = ~values.isnan()
        self._sums[_MEANS.index(mean)] += torch.where(known, values, 0.0)
        self._counts[_MEANS.index(mean)] += known


def _copy(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_copy(entry, device) for entry in value]
    return value.to(device, copy=True) if isinstance(value, Tensor) else value
