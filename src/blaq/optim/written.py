"""What the optimizer has written into the parameters, to tell writes from outside: training would silently throw them away."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from blaq.optim import held, update
from blaq.optim.batches import Batch
from blaq.optim.held import State
from blaq.optim.update import Group, Rates

_ROUNDING = 2.0**-16  # of a trial point, which compiled code may compute otherwise


class Record(NamedTuple):
    """A parameter as it was written: its version, and where it lies in memory."""

    p: Tensor
    version: int
    place: int
    solved: Tensor | None = None
    """The latent weight that its scale was solved for."""
    solved_version: int = 0
    ahead: Rates | None = None
    """Of the trial point of "past" that it holds."""

    @property
    def untouched(self) -> bool:
        """Whether nobody has written since, as far as versions tell: not through ``.data``."""
        return self.version == self.p._version and self.place == self.p.data_ptr()


class Written:
    """Records of parameters; there is none where it is not known what a parameter holds, as after loading a state."""

    def __init__(self) -> None:
        self._records: dict[int, Record] = {}  # by the id of a parameter; tensors hash in Python, and slowly

    def forget(self, parameters: Sequence[Tensor] | None = None) -> None:
        """Nothing is known of some parameters, or of all."""
        if parameters is None:
            self._records.clear()
        for p in parameters or ():
            self._records.pop(id(p), None)

    def note(self, p: Tensor) -> None:
        """A parameter holds what it shall."""
        known = self._records.get(id(p))
        self._records[id(p)] = Record(p, p._version, p.data_ptr(), ahead=known.ahead if known is not None else None)

    def note_step(self, batch: Batch, trial: str) -> None:
        """A step has written the parameters of a batch."""
        quantized = batch.group["grid"] is not None
        ahead = Rates.of(batch.group, batch.t + 1) if trial == "past" else None
        for p, state in zip(batch.parameters, batch.states, strict=True):
            latent = state["latent"] if quantized else None
            solved = latent._version if latent is not None else 0
            self._records[id(p)] = Record(p, p._version, p.data_ptr(), latent, solved, ahead)

    def proof(self, p: Tensor, state: State) -> Tensor | None:
        """What is finite if and only if the latent weight is: its scale, which all of it went into; else itself."""
        latent: Tensor | None = state.get("latent")
        if latent is None:
            return None
        known = self._records.get(id(p))
        seen = known is not None and known.solved is latent and known.solved_version == latent._version
        return state["scale"] if seen else latent

    def untouched(self, p: Tensor) -> bool:
        """Whether it is known that nobody has written to a parameter, short of ``.data``."""
        known = self._records.get(id(p))
        return known is not None and known.untouched

    def is_ours(self, group: Group, p: Tensor, state: State) -> bool:
        """Whether a parameter holds what the optimizer wrote. At a trial point that is not known the grid alone can tell."""
        known = self._records.get(id(p))
        ahead = known.ahead if known is not None else None
        if ahead is None and group["grid"] is None and _at_trial_point(group, state):
            return True
        return self.holds_ours(group, p, state)

    def holds_ours(self, group: Group, p: Tensor, state: State) -> bool:
        """`is_ours` by the values themselves, which sees what was written through ``.data`` too."""
        known = self._records.get(id(p))
        ahead = known.ahead if known is not None else None
        at_trial_point = _at_trial_point(group, state)
        if group["grid"] is not None:
            if not held.is_on_grid(p, state["scale"], group):
                return False
            training_past = group["trial"] == "past" and not group["evaluating"]
            if ahead is None if at_trial_point else known is None and training_past:
                # Which point it is, is not known: a step may have been broken off, and the state gone on without it.
                return True
        if at_trial_point:
            # Without a record the learning rate may have been another one: then it is adopted, a step ahead.
            ahead = ahead or Rates.of(group, int(state["trial_step"]) + 1)
            w, _ = update.forward(state["latent"], state["exp_avg"], state["exp_avg_sq"], state["trial_grad"], ahead)
            rounding = _ROUNDING * float(w.abs().max()) if w.numel() else 0.0
        else:
            w, rounding = state["latent"], 0.0
            if not p.is_cpu and known is not None and known.untouched:
                return True  # compiled code of other devices may round a tie otherwise than the values computed here

        def values(w: Tensor) -> Tensor:
            return (w if group["grid"] is None else held.held_values(w, state["scale"], group)).to(p.dtype)

        return bool(((values(w - rounding) <= p) & (p <= values(w + rounding))).all())  # neither falls as w rises


def _at_trial_point(group: Group, state: State) -> bool:
    """Whether parameters hold a trial point of "past"; before the first step it is the latent weight."""
    return group["trial"] == "past" and not group["evaluating"] and int(state["trial_step"]) > 0
