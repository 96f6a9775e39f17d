"""Training on several processes: two ranks of DDP over gloo end where one process ends that has both halves of the batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import blaq

_STEPS, _BATCH = 6, 8
_TRIALS = ("fresh", "past", "delayed", "none")


def _train(model: nn.Module, trial: str, share: slice) -> list[Tensor]:
    """Everything that training leaves behind, from the gradients of a share of every batch."""
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    opt = blaq.BLAQ(blaq.param_groups(bare, "ternary"), lr=0.02, trial=trial, module=bare)
    generator = torch.Generator().manual_seed(1)
    for _ in range(_STEPS):
        inputs = torch.randn(_BATCH, 5, dtype=torch.float64, generator=generator)[share]
        targets = inputs.sum(1, keepdim=True).sin()

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            opt.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            return loss

        opt.step(closure)
    opt.eval()
    states = [value for state in opt.state.values() for value in state.values()]
    return [t.detach().clone() for t in (*bare.parameters(), *bare.buffers(), *states)]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 1)).double()


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    half = slice(rank * _BATCH // 2, (rank + 1) * _BATCH // 2)
    ends = {}
    for trial in _TRIALS:
        for views in (False, True):  # of the memory that gradients are exchanged in
            model = DistributedDataParallel(_model(), gradient_as_bucket_view=views)
            ends[trial, views] = _train(model, trial, half)
    torch.save(ends, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, bool], list[Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)]) for rank in range(2)]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("trial", _TRIALS)
def test_two_ranks_agree_and_equal_one_process(
    ends: list[dict[tuple[str, bool], list[Tensor]]], trial: str, views: bool
) -> None:
    first, second = (of_rank[trial, views] for of_rank in ends)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = _train(_model(), trial, slice(None))
    for found, expected in zip(first, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bits", [2, None])
def test_weights_that_are_spread_over_processes_are_refused_by_name(tmp_path: Path, bits: int | None) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Linear(4, 4)
        mesh = init_device_mesh("cpu", (1,))
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(
            ValueError, match=r"BLAQ: 'weight' is spread over processes \(DTensor.*DistributedDataParallel"
        ):
            blaq.BLAQ(blaq.param_groups(model, bits))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    _rank(int(sys.argv[1]), sys.argv[2])
