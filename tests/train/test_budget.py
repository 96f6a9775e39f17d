"""Equal gradient evaluations: how many epochs that takes, and what becomes of the schedule."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blaq.train.budget import equal_gradients, gradient_epochs, stretched
from blaq.train.config import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from blaq.train.module import build_optimizer, build_schedule


def recipe(epochs: int, **optim: Any) -> Recipe:
    return Recipe(
        name="tiny",
        title="",
        data=DataConfig(source="digits"),
        model=ModelConfig(name="mlp"),
        optim=OptimConfig(**optim),
        train=TrainConfig(epochs=epochs),
    )


def counted(optim: OptimConfig, epochs: int, steps: int) -> int:
    """Gradient evaluations of a run, step by step, as the optimizer takes them."""
    model = torch.nn.Linear(2, 2)
    opt = build_optimizer(model, optim)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = model(torch.ones(1, 2)).square().sum()
        loss.backward()
        return loss

    for epoch in range(epochs):
        opt.trial = optim.trial_in(epoch)
        for _ in range(steps):
            opt.step(closure)
    return opt.gradient_evaluations


@pytest.mark.parametrize(
    ("optim", "epochs"),
    [
        ({"method": "blaq", "period": 2}, 5),
        ({"method": "blaq", "period": 1, "trial_every": 3}, 2),
        ({"method": "laq"}, 3),
        ({"method": "float"}, 3),
        ({"method": "past"}, 3),
        ({"method": "delayed"}, 3),
        ({"method": "bwn"}, 3),
    ],
)
def test_gradient_evaluations_are_predicted(optim: dict[str, Any], epochs: int) -> None:
    config = OptimConfig(**optim)
    assert gradient_epochs(config, epochs) * 6 == counted(config, epochs, steps=6)


@given(epochs=st.integers(1, 40), period=st.integers(1, 40), every=st.integers(1, 7))
def test_cheaper_methods_train_to_the_nearest_whole_epoch(epochs: int, period: int, every: int) -> None:
    period = min(period, epochs)
    runs = equal_gradients(
        {
            "laq": recipe(epochs, method="laq"),
            "blaq": recipe(epochs, method="blaq", period=period, trial_every=every),
        }
    )
    assert runs["blaq"].train.epochs == epochs
    wanted = epochs + (epochs // period) / every
    nearest = min(range(epochs, 2 * epochs + 1), key=lambda count: (abs(count - wanted), count))
    assert runs["laq"].train.epochs == nearest


def test_without_a_second_gradient_nothing_changes() -> None:
    runs = {method: recipe(7, method=method) for method in ("float", "laq", "past")}
    assert equal_gradients(runs) == runs


def rates(run: Recipe) -> list[float]:
    """The learning rate of every epoch's first step, and the one after the last."""
    opt = build_optimizer(torch.nn.Linear(2, 2), run.optim)
    schedule = build_schedule(opt, run.optim, run.train.epochs, 1)
    found = [opt.param_groups[0]["lr"]]
    for _ in range(run.train.epochs):
        opt.param_groups[0]["params"][0].grad = None
        opt.step(lambda: torch.zeros((), requires_grad=True).backward())
        if schedule is not None:
            schedule.step()
        found.append(opt.param_groups[0]["lr"])
    return found


def test_a_stretched_schedule_ends_where_it_would_have() -> None:
    step = recipe(20, method="laq", lr=1.0, schedule="step", schedule_every=5, schedule_factor=0.1)
    assert stretched(step, 24).optim.schedule_every == 6
    assert rates(stretched(step, 24))[5::6] == pytest.approx(rates(step)[4::5])
    exponential = recipe(10, method="laq", lr=1.0, schedule="exponential", schedule_factor=0.5)
    assert rates(stretched(exponential, 15))[-1] == pytest.approx(rates(exponential)[-1]) == 0.5**10
    cosine = recipe(10, method="laq", lr=1.0, schedule="cosine")
    assert rates(stretched(cosine, 15))[-1] == pytest.approx(0, abs=1e-12)
    assert rates(stretched(cosine, 15))[6] == pytest.approx(rates(cosine)[4])
    assert set(rates(stretched(recipe(2, lr=0.25, method="laq"), 3))) == {0.25}


@pytest.mark.parametrize(("every", "epochs", "expected"), [(3, 12, 4), (1, 11, 1), (1, 12, 1), (4, 18, 7)])
def test_whole_epochs_between_falls(every: int, epochs: int, expected: int) -> None:
    step = recipe(10, method="laq", schedule="step", schedule_every=every, schedule_factor=0.1)
    assert stretched(step, epochs).optim.schedule_every == expected
