"""LAQ: loss-aware quantization with one gradient a step."""

from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from blaq.optim.blaq import BLAQ


class LAQ(BLAQ):
    """Loss-aware quantization with one gradient a step: `BLAQ` with ``trial="none"``. ``step()`` needs no closure.

    ::

        m, v = Adam's moments        d = sqrt(v_hat) + eps
        w <- w - lr m_hat / d        parameter <- P_d(w)

    Example:
        >>> import blaq, torch
        >>> model = torch.nn.Linear(3, 2)
        >>> opt = blaq.LAQ(blaq.param_groups(model, bits=2), lr=0.01)
        >>> model(torch.ones(4, 3)).square().mean().backward()
        >>> opt.step()
        >>> opt.gradient_evaluations
        1

    Source: Hou, Yao and Kwok, ICLR 2017, algorithm 1 (LAB); Hou and Kwok, ICLR 2018, algorithm 1 (LAT, LAQ).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        curvature: str = "adam",
        clip: float | None = None,
        module: nn.Module | None = None,
        compile: bool | None = None,
    ) -> None:
        rest: dict[str, Any] = {"curvature": curvature, "clip": clip, "module": module, "compile": compile}
        super().__init__(params, lr, betas, eps, weight_decay, a=1.0, trial="none", **rest)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of LAQ; see `BLAQ.load_state_dict`.

        Raises:
            ValueError: as there; also a state whose steps take a trial.
        """
        for group in state_dict.get("param_groups", ()):
            if group.get("trial", "none") != "none":
                raise ValueError(
                    f"LAQ.load_state_dict(): checkpoint has trial={group['trial']!r}; load it into blaq.BLAQ, and set trial "
                    "to 'none' to go on without."
                )
        super().load_state_dict(state_dict)
