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
        """Read the state of the CPU's generator and of the given devices' generators."""
        states = {torch.device("cpu"): torch.get_rng_state()}
        for device in devices:
            if device.type not in ("cpu", "meta"):
                states[device] = torch.get_device_module(device).get_rng_state(device)
        return RandomState(states)

    def restore(self) -> None:
        """Set the generators back."""
        for device, state in self.states.items():
            if device.type == "cpu":
                torch.set_rng_state(state)
            else:
                torch.get_device_module(device).set_rng_state(state, device)


class BufferState:
    """The values of all buffers of a module, also of those that a forward pass replaces instead of writing into."""

    def __init__(self, module: nn.Module | None) -> None:
        self._saved: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        if module is not None:
            for owner in module.modules():
                for name, buffer in owner.named_buffers(recurse=False):
                    self._saved.append((owner, name, buffer, buffer.detach().clone()))

    def restore(self) -> None:
        """Put every buffer back: the same tensor object, with the same values."""
        with torch.no_grad():
            for owner, name, buffer, values in self._saved:
                buffer.copy_(values)
                owner._buffers[name] = buffer


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
