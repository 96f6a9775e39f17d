"""What the exports to a runtime share: what they accept, and that no file appears before the runtime has proved it."""

import copy
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from blaq.export.layers import quantized_weights, shipped, weights_of_run
from blaq.export.preprocessing import preprocessing
from blaq.export.runtimes import Session
from blaq.export.verify import Verification, evaluation_batches, verify_outputs, verify_session, verify_weights
from blaq.optim.base import LatentOptimizer

Inputs = tuple[Tensor, ...]
ToGraph = Callable[..., Any]  # (model, weights, inputs, recipe=, data=) -> the runtime's graph
Unverified = Callable[[Any, Path], AbstractContextManager[Session]]


def export_model(
    model: nn.Module,
    opt: LatentOptimizer,
    example_inputs: Tensor | Inputs,
    path: Path,
    to_graph: ToGraph,
    unverified: Unverified,
    *,
    resize: bool = True,
) -> Path:
    """Write a model of the user's, proved on the example inputs, and with `resize` on others of other sizes."""
    inputs = tuple(x.detach().cpu() for x in as_tuple(example_inputs))
    with shipped(opt):
        weights = quantized_weights(model, opt)
        model = copy.deepcopy(model).cpu().eval()
    with unverified(to_graph(model, weights, inputs), path) as session:
        verify_weights(session, weights)
        others = resized(inputs) if resize else {}
        verify_outputs(session, model, weights, [inputs, *others.values()])
    return path


def export_checkpoint(
    run: Path,
    out: Path,
    checkpoint: Literal["best", "last"],
    to_graph: ToGraph,
    unverified: Unverified,
    report: Callable[[Verification], None] | None,
) -> Path:
    """Write a run's checkpoint, proved on its validation data."""
    model, weights, recipe = weights_of_run(run, checkpoint)
    batches = evaluation_batches(recipe, "validation")
    inputs, _ = next(iter(batches))
    graph = to_graph(model, weights, (inputs[:2],), recipe=asdict(recipe), data=preprocessing(batches.dataset))
    with unverified(graph, out) as session:
        verification = verify_session(session, model, weights, batches)
    if report is not None:
        report(verification)
    return out


def as_tuple(inputs: Tensor | Inputs) -> Inputs:
    """What a model is called with, as a tuple."""
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)


def changing_axes(x: Tensor) -> list[int]:
    """The axes of an input that may change: examples, and of tokens the sequence.

    Example:
        >>> changing_axes(torch.zeros(2, 5, dtype=torch.int64)), changing_axes(torch.zeros(2, 5))
        ([0, 1], [0])
    """
    return [0, 1] if x.ndim == 2 and not x.is_floating_point() else [0] if x.ndim else []


def resized(inputs: Inputs) -> dict[str, Inputs]:
    """The inputs with one axis changed, by the name of the axis: an exporter may have taken its size for a constant."""
    found = {"batch": tuple(x[:1] if x.ndim and len(x) > 1 else torch.cat([x, x]) if x.ndim else x for x in inputs)}
    if any(1 in changing_axes(x) and x.shape[1] > 1 for x in inputs):
        found["sequence"] = tuple(x[:, :-1] if 1 in changing_axes(x) else x for x in inputs)
    return found


def check_target(owner: str, path: str | Path, preset: str, suffix: str, packages: Sequence[str], extra: str) -> Path:
    """The path, if an export can go there.

    Raises:
        ImportError: a package is missing.
        ValueError: another preset, another suffix, no such directory; a directory of that name.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{owner}: needs {package}; pip install 'blaq[{extra}]'.")
    if preset not in ("exact", "fast"):
        raise ValueError(f"{owner}(preset={preset!r}): expected 'exact' or 'fast'.")
    path = Path(path)
    if path.suffix != suffix:
        raise ValueError(f"{owner}(path={str(path)!r}): expected a name that ends in {suffix}.")
    if not path.parent.is_dir():
        raise ValueError(f"{owner}(path={str(path)!r}): there is no folder {str(path.parent)!r}.")
    if path.is_dir():
        raise ValueError(
            f"{owner}(path={str(path)!r}): is a folder; expected the name of a file, new or to be replaced."
        )
    return path
