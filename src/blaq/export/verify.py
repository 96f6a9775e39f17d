"""Proof that a runtime computes from an exported file what torch computes from the trained weights.

Three questions, in this order: are the weights those of the run, bit for bit, as the runtime sees them; are the outputs
torch's; is the accuracy torch's. Every export ends with them, and `verify_file` asks them again at any time.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from blaq.export.layers import QuantizedWeight, weights_of_run
from blaq.export.packed_session import CompressedSession, PackedSession, computed, layer_outputs, tensors
from blaq.export.runtimes import SUFFIXES, Session, open_session

if TYPE_CHECKING:
    from blaq.tasks.batches import Batches
    from blaq.train.config import Recipe

__all__ = [
    "TOLERANCE",
    "Verification",
    "VerificationError",
    "evaluation_batches",
    "verify_file",
    "verify_outputs",
    "verify_session",
    "verify_weights",
]

TOLERANCE = {"exact": 1e-5, "fast": 2e-2}
"""Largest difference of an output from torch's, of the largest output."""
POINTS = 0.2  # of accuracy, in percent, or one example where that is more

Batch = tuple[Tensor, ...]


class VerificationError(ValueError):
    """A runtime computes something else than torch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What a verification has found; one that failed is a `VerificationError`.

    Attributes:
        description: of the file, see `blaq.export.runtimes.Session`.
        weights: number of quantized weights that are equal bit for bit.
        difference: largest difference of an output from torch's, of the largest output of torch.
        examples: how many went through the runtime; of text, characters.
        error: wrong predictions in percent, in the runtime.
        torch_error: the same in torch.
    """

    description: dict[str, Any]
    weights: int
    difference: float
    examples: int
    error: float
    torch_error: float


def verify_file(
    path: Path,
    run: Path,
    *,
    split: Literal["validation", "test"] = "validation",
    checkpoint: Literal["best", "last"] = "best",
) -> Verification:
    """Compare an exported file with the run it was made from, on the run's data.

    Args:
        path: ``.onnx``, ``.xml`` (OpenVINO), ``.safetensors``, or a folder for compressed-tensors.
        run: the run directory.
        split: the data to compare outputs on.
        checkpoint: the one that was exported.

    Raises:
        VerificationError: the file is not that of the run, or the runtime computes something else; names the layer.
        ValueError: no such file or run.
    """
    path = Path(path)
    if not path.is_dir() and path.suffix not in (*SUFFIXES, ".safetensors"):
        raise ValueError(
            f"verify({str(path)!r}): expected what `blaq export` wrote: a file of type {', '.join(SUFFIXES)} or .safetensors, "
            "or the folder of --format compressed-tensors."
        )
    model, weights, recipe = weights_of_run(run, checkpoint)
    session: Session
    if path.is_dir():
        session = CompressedSession(path, model, [weight.name for weight in weights])
    elif path.suffix == ".safetensors":
        session = PackedSession(path, model)
    else:
        session = open_session(path)
    return verify_session(session, model, weights, evaluation_batches(recipe, split))


def verify_session(
    session: Session, model: nn.Module, weights: Sequence[QuantizedWeight], batches: "Batches"
) -> Verification:
    """The same for a session that is open, on batches of (inputs, targets).

    Raises:
        VerificationError: see `verify_file`.
    """
    verify_weights(session, weights)
    comparison, examples, wrong, wrong_in_torch = _Comparison(), 0, 0, 0
    for inputs, targets in batches:
        if not examples and session.batch is None:
            comparison.add(session, model, (inputs[:1],))  # runtimes have other kernels for few examples
        outputs, expected = comparison.add(session, model, (inputs,))
        examples += targets.numel()
        wrong += int((outputs[0].argmax(-1) != targets.numpy()).sum())
        wrong_in_torch += int((expected[0].argmax(-1) != targets.numpy()).sum())
    comparison.check(session, model, weights)
    error, torch_error = 100 * wrong / examples, 100 * wrong_in_torch / examples
    if 100 * abs(wrong - wrong_in_torch) > max(POINTS * examples, 100):
        raise VerificationError(
            f"verify ({session.preset}): {error:.2f} % wrong in the runtime, {torch_error:.2f} % in torch; allowed is a "
            f"difference of {POINTS} points.{_remedy(session)}"
        )
    return Verification(
        description=session.description,
        weights=len(weights),
        difference=comparison.difference,
        examples=examples,
        error=error,
        torch_error=torch_error,
    )


def verify_weights(session: Session, weights: Sequence[QuantizedWeight]) -> None:
    """Whether the runtime sees every quantized weight as ``scale * level``, bit for bit.

    Raises:
        VerificationError: it does not; names the first weight.
    """
    found = session.weights()
    expected = {weight.name: weight.values.numpy() for weight in weights}
    if found.keys() != expected.keys():
        names = ", ".join(repr(name) for name in sorted(found.keys() ^ expected.keys()))
        raise VerificationError(f"verify: file and model do not have the same quantized weights: {names}.")
    for name, values in expected.items():
        seen = found[name]
        if seen.shape != values.shape:
            raise VerificationError(f"verify: {name!r} has shape {seen.shape} in the file, expected {values.shape}.")
        different = np.argwhere(seen != values)  # NaN is different, 0 is -0
        if len(different):
            first = tuple(int(i) for i in different[0])
            raise VerificationError(
                f"verify: {name!r} is not scale times level in the runtime: {len(different)} of {values.size} weights "
                f"differ, the first at {list(first)}: {seen[first]}, expected {values[first]}."
            )


def verify_outputs(
    session: Session, model: nn.Module, weights: Sequence[QuantizedWeight], batches: Iterable[Batch]
) -> float:
    """The largest difference of an output from torch's, of the largest output, on batches of inputs.

    Raises:
        VerificationError: more than `TOLERANCE`, NaN, or another shape; names the first layer that differs.
    """
    comparison = _Comparison()
    for inputs in batches:
        comparison.add(session, model, inputs)
    comparison.check(session, model, weights)
    return comparison.difference


def evaluation_batches(recipe: "Recipe", split: Literal["validation", "test"]) -> "Batches":
    """The batches of a run's validation or test data, in order."""
    from blaq.tasks.batches import Batches
    from blaq.train.run import load_data

    dataset = load_data(recipe.data)
    return Batches(getattr(dataset, split), dataset, recipe.data.batch_size, shuffle=False, seed=0)


class _Comparison:
    """The outputs of a runtime and of torch, and where they differ most."""

    def __init__(self) -> None:
        self._differences: NDArray[Any] = np.zeros(0)  # of every output
        self._largest: NDArray[Any] = np.zeros(0)
        self._worst: tuple[float, Batch] | None = None

    @property
    def difference(self) -> float:
        """Of the worst output, relative to its largest value; NaN if there is one."""
        return float(_relative(self._differences, self._largest).max(initial=0.0))

    def add(self, session: Session, model: nn.Module, inputs: Batch) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
        """Compare a batch; the outputs of the runtime and of torch."""
        outputs = session.outputs(*(x.numpy() for x in inputs))
        expected = [y.numpy() for y in tensors(computed(model, inputs))]
        shapes, wanted = [y.shape for y in outputs], [y.shape for y in expected]
        if shapes != wanted:
            raise VerificationError(f"verify: outputs of shape {shapes} in the runtime, {wanted} in torch.")
        differences = np.array([_largest(_minus(y, z)) for y, z in zip(outputs, expected, strict=True)])
        largest = np.array([_largest_finite(z) for z in expected])
        if self._worst is None:
            self._differences, self._largest = np.zeros(len(outputs)), np.zeros(len(outputs))
        self._differences = np.maximum(self._differences, differences)  # keeps NaN
        self._largest = np.maximum(self._largest, largest)
        worst = float(np.nan_to_num(differences, nan=np.inf).max(initial=0.0))
        if self._worst is None or worst > self._worst[0]:
            self._worst = worst, inputs
        return outputs, expected

    def check(self, session: Session, model: nn.Module, weights: Sequence[QuantizedWeight]) -> None:
        """Raise unless all outputs were equal up to the preset's tolerance."""
        allowed = TOLERANCE[session.preset]
        if self.difference < allowed or self._worst is None:
            return
        if np.isnan(self._largest).any():
            raise VerificationError("verify: torch's own outputs are NaN; the model has diverged.")
        layer = _first_difference(session, model, weights, self._worst[1], allowed)
        where = (
            f"the first layer that differs is {layer[0]!r} ({layer[1]:.1e})"
            if layer
            else "no quantized layer differs by itself"
        )
        raise VerificationError(
            f"verify ({session.preset}): the runtime's outputs are not torch's: relative difference "
            f"{self.difference:.1e}, allowed {allowed:.0e}; {where}.{_remedy(session)}"
        )


def _first_difference(
    session: Session, model: nn.Module, weights: Sequence[QuantizedWeight], inputs: Batch, allowed: float
) -> tuple[str, float] | None:
    """The first quantized layer whose output differs by more than is allowed, and by how much."""
    returned = layer_outputs(model, [weight.name for weight in weights], inputs)
    for name, seen in session.layers(*(x.numpy() for x in inputs)).items():
        if name not in returned or returned[name].shape != seen.shape:
            continue
        values = returned[name].numpy()
        difference = float(_relative(np.array(_largest(_minus(seen, values))), np.array(_largest_finite(values))))
        if not difference < allowed:
            return name, difference
    return None


def _minus(y: NDArray[Any], z: NDArray[Any]) -> NDArray[Any]:
    """The difference, 0 of equal infinities; of truth values whether they differ."""
    found: NDArray[Any] = (y != z).astype(np.float32)
    if z.dtype != np.bool_:
        found = np.subtract(y, z, out=np.zeros(z.shape, np.result_type(y, z)), where=y != z)
    return found


def _largest(values: NDArray[Any]) -> float:
    return float(np.abs(values).max(initial=0.0))


def _largest_finite(values: NDArray[Any]) -> float:
    """What differences are relative to: the largest value but infinity; NaN if there is one."""
    return _largest(values[~np.isinf(values)])


def _relative(differences: NDArray[Any], largest: NDArray[Any]) -> NDArray[Any]:
    return np.where(differences == 0, 0.0, differences / np.where(largest == 0, 1.0, largest))


def _remedy(session: Session) -> str:
    return " Export with preset 'exact'." if session.preset == "fast" else ""
