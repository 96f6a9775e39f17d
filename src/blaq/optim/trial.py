"""What a second evaluation of the loss must not disturb: buffers and random state.

The second gradient of a step belongs to the same mini-batch and the same dropout masks, and it must leave BatchNorm's
statistics, and every other buffer, as the first evaluation left them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(slots=True)
class RandomState:
    """The states of the generators that a forward pass draws from: the CPU's and those of the devices in use."""

    states: dict[torch.device, Tensor]

    @staticmethod
    def capture(devices: Iterable[torch.device]) -> "RandomState":
        """Read the state of the CPU's generator and of the given devices' generators.

        Raises:
            ValueError: a device whose generator torch cannot read, such as XLA's.
        """
        states = {torch.device("cpu"): torch.get_rng_state()}
        for device in devices:
            if device.type not in ("cpu", "meta"):
                generators = getattr(torch, device.type, None)
                if generators is None or not hasattr(generators, "get_rng_state"):
                    raise ValueError(
                        f"optimizer on {device}: torch cannot read the random state of this device, so an evaluation could be "
                        "neither repeated nor undone; take one gradient (trial='past' or 'none') and call step() without a "
                        "closure."
                    )
                states[device] = generators.get_rng_state(device)
        return RandomState(states)

    def restore(self) -> None:
        """Set the generators back."""
        for device, state in self.states.items():
            if device.type == "cpu":
                torch.set_rng_state(state)
            else:
                torch.get_device_module(device).set_rng_state(state, device)


class BufferState:
    """The buffers of a module and their values: also of those that a forward pass replaces, drops or makes."""

    def __init__(self, module: nn.Module | None) -> None:
        owners = _all_modules(module) if module is not None else ()
        self._buffers = [(owner._buffers, dict(owner._buffers)) for owner in owners]
        found = {id(b): b for _, then in self._buffers if then for b in then.values() if b is not None}
        with torch.no_grad():
            self._values = [(buffer, buffer.clone()) for buffer in found.values() if _is_writable(buffer)]

    def restore(self) -> None:
        """Put every buffer back: the same tensor object, with the same values."""
        for now, then in self._buffers:
            now.clear()
            now.update(then)
        with torch.no_grad():
            for buffer, values in self._values:
                buffer.copy_(values)


def _all_modules(module: nn.Module) -> Iterable[nn.Module]:
    """`nn.Module.modules`, without the names that it makes: this is asked in every step."""
    found = {module: None}  # a dict: it keeps the order
    waiting = [module]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and child not in found:
                found[child] = None
                waiting.append(child)
    return found


def _is_writable(buffer: Tensor) -> bool:
    """False where torch itself refuses to write, so that no forward pass can have written."""
    if buffer.layout != torch.strided:
        return not buffer.is_inference()
    shared = not buffer.is_contiguous() and any(
        size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)
    )
    return not shared and not buffer.is_inference()


@dataclass(slots=True)
class Snapshot:
    """Buffers and random state at one moment of a step."""

    buffers: BufferState
    random: RandomState

    @staticmethod
    def take(module: nn.Module | None, devices: Iterable[torch.device]) -> "Snapshot":
        """Remember the state as it is now."""
        return Snapshot(BufferState(module), RandomState.capture(devices))

    def restore(self) -> None:
        """Go back to it."""
        self.buffers.restore()
        self.random.restore()


class Evaluations:
    """The forward and backward passes of a step under way: those before its trial begin somewhere, those at it do so again."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The step is over, or its batch was skipped."""
        self._before: Snapshot | None = None
        self._random: list[RandomState] = []
        self._repeated = 0

    def first(self, module: nn.Module | None, devices: Iterable[torch.device]) -> None:
        """One before the trial begins."""
        if self._before is None:
            self._before = Snapshot.take(module, devices)
            self._random = [self._before.random]
        else:
            self._random.append(RandomState.capture(devices))

    def again(self) -> None:
        """One at the trial point begins: it draws the same random numbers."""
        if self._repeated < len(self._random):
            self._random[self._repeated].restore()
        self._repeated += 1

    def check(self, owner: str) -> None:
        """Refuse a second half that repeats some and not all of the first."""
        if self._random and 0 < self._repeated != len(self._random):
            raise ValueError(
                f"{owner}: {len(self._random)} evaluation() before forward_step() and {self._repeated} before "
                "backtrack_step(); both halves need the same ones. Call abandon_step() where a batch is skipped."
            )

    def undo(self, otherwise: Snapshot | None) -> None:
        """Buffers and random state as before the first; where there was none, as another snapshot has them."""
        before = self._before if self._before is not None else otherwise
        self.forget()
        if before is not None:
            before.restore()
