"""memory_report: byte for byte what the optimizer then holds, in every mode and dtype."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import blaq
from blaq.optim.options import TRIALS

MODES = [(bits, granularity) for bits in ("binary", "ternary2", "linear4") for granularity in ("tensor", "channel", 2)]


def held(tensors: Any) -> int:
    """Bytes of memory behind tensors, each piece once."""
    pieces = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(pieces.values())


def own(tensors: Any) -> int:
    """Bytes of tensors that may share their memory with others."""
    return sum(t.nbytes for t in tensors)


def state_of(opt: blaq.BLAQ, p: Tensor) -> list[Tensor]:
    assert all(isinstance(value, Tensor) for value in opt.state[p].values())
    return list(opt.state[p].values())


def parameters(opt: blaq.BLAQ) -> list[Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("trial", TRIALS)
@pytest.mark.parametrize(("bits", "granularity"), MODES)
def test_state_after_steps(new_task: Any, bits: str, granularity: Any, trial: str, dtype: torch.dtype) -> None:
    task = new_task(bits, granularity, "alternating", dtype=dtype, trial=trial)
    opt = task.opt
    before = blaq.memory_report(
        [{key: group[key] for key in ("params", "grid", "granularity")} for group in opt.param_groups], trial
    )
    task.train(range(4))
    report = blaq.memory_report(opt)
    assert [row.name for row in report.rows] == [row.name for row in blaq.plan(opt.param_groups).rows]
    assert [row.state for row in report.rows] == [own(state_of(opt, p)) for p in parameters(opt)]
    assert report.total.state == held(t for p in parameters(opt) for t in state_of(opt, p))
    # By groups, without an optimizer and before any: the same, but for the names.
    assert (before.trial, before.total, before.temporaries) == (report.trial, report.total, report.temporaries)
    for row, p in zip(report.rows, parameters(opt), strict=True):
        state = opt.state[p]
        assert row.moments == own([state["exp_avg"], state["exp_avg_sq"]])
        assert row.latent == own([state["latent"]] if "latent" in state else [])
        assert row.scale == own([state["scale"]] if "scale" in state else [])
        assert row.remembered == own([state["trial_grad"]] if "trial_grad" in state else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "granularity"), MODES)
def test_what_a_trial_puts_aside(new_task: Any, bits: str, granularity: Any, dtype: torch.dtype) -> None:
    task = new_task(bits, granularity, dtype=dtype)
    opt = task.opt
    task.train(range(2))
    task.closure(2)()
    opt.forward_step()
    pending = opt._pending
    aside = [*pending.gradients.values(), *pending.floats.values(), *pending.scales.values()]
    report = blaq.memory_report(opt)
    assert report.total.aside == held(aside)
    assert report.total.state == held(t for p in parameters(opt) for t in state_of(opt, p))
    assert all(
        p.grad is None for p in parameters(opt)
    )  # the first gradient is counted here, the second as the gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_past_puts_aside_to_evaluate(new_task: Any, dtype: torch.dtype) -> None:
    task = new_task("ternary2", dtype=dtype, trial="past").train(range(3))
    opt = task.opt
    report = blaq.memory_report(opt)
    opt.eval()
    assert report.total.bytes == held(t for p in parameters(opt) for t in state_of(opt, p))
    assert blaq.memory_report(opt) == report
    opt.train()
    assert report.total.state == held(t for p in parameters(opt) for t in state_of(opt, p))


def test_bytes_a_weight_and_the_largest_tensor() -> None:
    w, b = torch.zeros(1000, 100), torch.zeros(1000)
    groups = [{"params": [w], "grid": "ternary"}, {"params": [b]}]
    found = {trial: [row.bytes for row in blaq.memory_report(groups, trial).rows] for trial in TRIALS}
    # Moments 8 and latent weight 4 a weight; one scale and one counter of 4 bytes; and see the docstring.
    assert found == {
        "none": [1_200_000 + 4 + 4, 8_000 + 4],
        "fresh": [1_600_000 + 8 + 4, 16_000 + 4],
        "delayed": [1_600_000 + 4 + 8, 12_000 + 8],
        "past": [2_000_000 + 8 + 8, 20_000 + 8],
    }
    assert blaq.memory_report(groups).trial == "fresh"
    assert blaq.memory_report(groups).temporaries == 400_000
    assert blaq.memory_report([{"params": [w.bfloat16()], "grid": "ternary"}]).temporaries == 400_000
    # Stepped together, seven copies of each: of 30 all, of 3000 as many as make 2^18 weights.
    assert blaq.memory_report([{"params": [b] * 30, "grid": "ternary"}]).temporaries == 30 * 7 * 4000
    assert blaq.memory_report([{"params": [b] * 3000, "grid": "ternary"}]).temporaries == 262 * 7 * 4000
    c = torch.zeros(50, 2)
    assert blaq.memory_report([{"params": [b, c], "grid": "ternary"}]).temporaries == 4000
    assert blaq.memory_report([{"params": [b, c, b]}]).temporaries == 2100 * 7 * 4  # without a grid, whatever the shape


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside take at once."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._meet((args, kwargs), made=False)
        result = function(*args, **(kwargs or {}))
        self._meet(result, made=True)
        return result

    def _meet(self, values: Any, *, made: bool) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and (memory := tensor.untyped_storage())._cdata not in self.known:
                self.known[memory._cdata] = memory.nbytes() if made else 0
                self.now += self.known[memory._cdata]
                self.most = max(self.most, self.now)
                weakref.finalize(memory, self._forget, memory._cdata)

    def _forget(self, memory: int) -> None:
        self.now -= self.known.pop(memory)


@pytest.mark.parametrize("trial", TRIALS)
@pytest.mark.parametrize("solver", ["exact", "alternating"])
@pytest.mark.parametrize("bits", [None, "ternary2", "linear4"])
def test_one_temporary_of_the_size_of_the_tensor(bits: str | None, solver: str, trial: str) -> None:
    """Building, the first step, the next and `eval`: beyond the state one tensor, and pieces."""
    weights, pieces = 2**21, 7 * 2**20  # a second tensor would be 8 * 2**20
    p = nn.Parameter(torch.empty(256, weights // 256).normal_(0, 0.05, generator=torch.Generator().manual_seed(0)))
    group = {"params": [p], "grid": bits, "solver": solver}
    with Peak() as building:
        opt = blaq.BLAQ(
            [group, {"params": [nn.Parameter(torch.ones(3))], "grid": "binary"}], trial=trial, compile=False
        )
    report = blaq.memory_report(opt)
    limit = report.temporaries + pieces
    assert building.most <= report.total.state + limit
    for seed in range(2):
        for half in (opt.forward_step, opt.backtrack_step) if trial == "fresh" else (opt.step,):
            p.grad = torch.empty_like(p).normal_(0, 0.01, generator=torch.Generator().manual_seed(seed))
            with Peak() as stepping:
                half()
            aside = p.nbytes if trial == "fresh" and bits is None else 0  # the parameter as it was
            assert stepping.most <= limit + aside, (seed, half)
    with Peak() as evaluating:
        opt.eval()
    assert evaluating.most <= limit + (p.nbytes if trial == "past" else 0)


def test_the_mode_is_the_optimizers_unless_one_is_named(new_task: Any) -> None:
    opt = new_task(trial="past").opt
    assert blaq.memory_report(opt).trial == blaq.memory_report(opt.param_groups).trial == "past"
    assert blaq.memory_report(opt, "none").trial == "none"
    opt.trial = "delayed"
    assert blaq.memory_report(opt).total.state == held(t for p in parameters(opt) for t in state_of(opt, p))


def test_before_there_are_weights() -> None:
    model = nn.Linear(100_000, 100_000, device="meta")  # 40 GB
    report = blaq.memory_report(blaq.param_groups(model, bits=1), trial="none")
    assert report.total.latent == 40_000_000_000


def test_the_lines() -> None:
    groups = blaq.param_groups(nn.Linear(1000, 10), bits=1)
    assert str(blaq.memory_report(groups)).splitlines() == [
        "training takes 160.2 kB beyond parameters and gradients (16.00 bytes a weight); temporaries 40.0 kB",
        "  trial fresh: moments 80.1 kB, latent weights 40.0 kB, scales 4 B, put aside during a trial 40.1 kB",
    ]
    assert "put aside while evaluating 40.0 kB" in str(blaq.memory_report(groups, "past"))
    assert str(blaq.memory_report([], "none")).startswith("training takes 0 B")


def test_refusals() -> None:
    w = torch.zeros(3, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"^memory_report\(trial='new'\): expected 'fresh', 'past', 'delayed' or 'none'"
    ):
        blaq.memory_report([{"params": [w]}], "new")
    with pytest.raises(
        ValueError, match=r"^memory_report\(Adam\): expected an optimizer of blaq; .* pass its param_groups"
    ):
        blaq.memory_report(torch.optim.Adam([w]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^memory_report\(Linear\): expected param groups"):
        blaq.memory_report(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group 0 is no param group"):
        blaq.memory_report([w])  # type: ignore[list-item]
