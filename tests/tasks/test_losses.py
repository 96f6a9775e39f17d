"""The losses against plain loops and closed-form gradients."""

import math

import pytest
import torch

from blaq.tasks.losses import LOSSES, cross_entropy, squared_hinge


@pytest.fixture
def logits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    # Spread beyond +-1, so that both sides of the hinge occur for targets and for the other classes.
    return 2.0 * torch.randn(6, 5, 4, generator=generator, dtype=torch.float64)


@pytest.fixture
def targets() -> torch.Tensor:
    return torch.randint(4, (6, 5), generator=torch.Generator().manual_seed(1))


def loop_squared_hinge(logits: list[list[float]], targets: list[int]) -> float:
    total = 0.0
    for row, target in zip(logits, targets, strict=True):
        for index, value in enumerate(row):
            sign = 1.0 if index == target else -1.0
            total += max(0.0, 1.0 - sign * value) ** 2
    return total / (len(logits) * len(logits[0]))


def loop_cross_entropy(logits: list[list[float]], targets: list[int]) -> float:
    total = 0.0
    for row, target in zip(logits, targets, strict=True):
        total += math.log(sum(math.exp(value) for value in row)) - row[target]
    return total / len(logits)


@pytest.mark.parametrize(
    ("name", "loop"), [("squared_hinge", loop_squared_hinge), ("cross_entropy", loop_cross_entropy)]
)
def test_loss_equals_a_plain_loop_for_images_and_for_text(name, loop, logits, targets):
    loss = LOSSES[name]
    images, labels = logits[:, 0], targets[:, 0]
    assert loss(images, labels).item() == pytest.approx(loop(images.tolist(), labels.tolist()), rel=1e-12)
    expected = loop(logits.reshape(-1, 4).tolist(), targets.reshape(-1).tolist())
    assert loss(logits, targets).item() == pytest.approx(expected, rel=1e-12)


def test_every_loss_has_a_name_and_is_tested():
    assert {"squared_hinge": squared_hinge, "cross_entropy": cross_entropy} == LOSSES


def test_squared_hinge_gradient_is_the_closed_form(logits, targets):
    images, labels = logits[:, 0].clone().requires_grad_(), targets[:, 0]
    squared_hinge(images, labels).backward()
    signs = torch.full_like(images, -1.0)
    for row, label in enumerate(labels.tolist()):
        signs[row, label] = 1.0
    closed = -2.0 * signs * torch.clamp(1.0 - signs * images.detach(), min=0.0) / images.numel()
    assert (closed == 0).any() and (closed > 0).any() and (closed < 0).any()
    torch.testing.assert_close(images.grad, closed, rtol=1e-12, atol=0.0)


def test_squared_hinge_is_zero_exactly_beyond_the_margin():
    targets = torch.tensor([2])
    assert squared_hinge(torch.tensor([[-1.0, -3.0, 1.0]]), targets).item() == 0.0
    assert squared_hinge(torch.tensor([[-1.0, -3.0, 0.5]]), targets).item() == pytest.approx(0.25 / 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squared_hinge_of_half_precision_logits_is_computed_in_float32(dtype, logits, targets):
    half = logits[:, 0].to(dtype).requires_grad_()
    loss = squared_hinge(half, targets[:, 0])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(squared_hinge(half.detach().double(), targets[:, 0]).item(), rel=1e-6)
    loss.backward()
    assert half.grad.dtype == dtype


@pytest.mark.parametrize("function", [squared_hinge, cross_entropy])
def test_targets_that_would_broadcast_are_refused(function):
    with pytest.raises(ValueError, match=rf"{function.__name__}\(targets of shape \(5,\)\): expected \(3, 5\)"):
        function(torch.zeros(3, 5, 4), torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_target_outside_the_classes_is_an_error(loss):
    with pytest.raises((RuntimeError, IndexError)):
        loss(torch.zeros(2, 10), torch.tensor([1, 10]))
