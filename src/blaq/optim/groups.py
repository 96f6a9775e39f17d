"""Model and rules to param groups: which parameter is quantized, how, and why the others are not."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from blaq.grids import Grid
from blaq.optim.rules import Names, Rule, RuleSpec, Scheme, check_scheme, first_matches, grid_or_float, parse_rule

BIAS = "bias"
NORMALISATION = "normalisation"
EMBEDDING = "embedding: name it in a rule to quantize"
OTHER = "not a layer's weight: name it in a rule to quantize"

_NORMALISATIONS = (
    nn.modules.batchnorm._NormBase,  # BatchNorm and InstanceNorm of every dimension, SyncBatchNorm
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
# Other libraries write their own: LlamaRMSNorm, T5LayerNorm, BatchNormAct2d. Not LayerNormLSTM, NormalizedLinear.
_NORMALISATION_NAME = re.compile(r"Norm(\d|Act|Gated|$)")


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A parameter under all its names; `reason` says why it is float by default, "" where it is not."""

    tensor: nn.Parameter
    names: Names
    reason: str

    @property
    def guarded(self) -> bool:
        """Whether only a rule that spells out its name quantizes it."""
        return self.tensor.ndim < 2 or self.reason in (BIAS, NORMALISATION)


class _Decision(NamedTuple):
    """What becomes of a parameter, and why where it is float."""

    parameter: _Parameter
    scheme: Scheme
    reason: str


def param_groups(
    model: nn.Module,
    bits: str | int | Grid | None,
    granularity: str | int = "tensor",
    solver: str = "alternating",
    rules: Mapping[str, RuleSpec] | None = None,
) -> list[dict[str, Any]]:
    """Sort a model's trainable parameters into param groups for `blaq.BLAQ` or any other optimizer.

    Quantized by default are weights of layers: parameters with "weight" in the last part of their name and two or more
    dimensions, that belong to no normalisation and no embedding. The rest stays float, and ``notes`` says why. A tied
    weight appears once, under the first of its names; tied to an embedding, it counts as an embedding.

    A rule is a glob against the name of a parameter or of any module around it: ``"conv1"`` takes all that is in
    ``conv1``, ``"*.bias"`` every bias; ``*`` crosses dots. The first match decides. A rule with bits quantizes
    embeddings and all else of two or more dimensions that it takes, but a bias, a normalisation or a vector only if the
    pattern spells out the parameter's own name: ``"fc.bias"`` and ``"*.bias"`` do; ``"fc"``, ``"fc.*"``, ``"*"`` don't.
    A normalisation must be spelled out with its module: ``"bn1.weight"``, not ``"*.weight"``.

    Args:
        model: any module; it is not changed.
        bits: what `Grid.parse` takes; None keeps all in float that no rule quantizes.
        granularity: what shares a scale: ``"tensor"``, ``"channel"`` (dimension 0), or a group size (inputs).
        solver: how a step finds the scale: ``"alternating"`` goes on from the last one, after one exact solve at the start;
            ``"exact"`` solves at every step, for three times the time.
        rules: pattern to None or ``"float"``, to what `Grid.parse` takes, or to a dict with some of the keys ``bits``,
            ``granularity`` and ``solver``.

    Returns:
        One group for each distinct scheme, the float group last. Keys: ``params``; ``param_names`` and ``notes``,
        aligned with them; ``grid`` (canonical name, None in float), ``granularity``, ``solver``.

    Raises:
        ValueError: a bad argument; a rule without effect (it matches nothing, earlier rules take all it matches, or it
            quantizes nothing); a group size that does not divide; nothing to train or to quantize.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))
        >>> for group in param_groups(model, bits=1, rules={"3": 4}):
        ...     print(group["grid"], group["param_names"], group["notes"])
        binary ['0.weight'] ['']
        linear4 ['3.weight'] ['']
        None ['0.bias', '1.weight', '1.bias', '3.bias'] ['bias', 'normalisation', 'normalisation', 'bias']
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"param_groups(model={type(model).__name__}): expected a torch.nn.Module; pass the model itself, its modules tell "
            "which parameters are biases and normalisation."
        )
    default = Scheme(grid_or_float(bits, f"param_groups(bits={bits!r})"), granularity, solver)
    check_scheme(default, "param_groups")
    if rules is not None and not isinstance(rules, Mapping):
        raise ValueError(f"param_groups(rules={rules!r}): expected a dict, such as {{'conv1': None, 'fc*': 4}}.")
    parsed = [parse_rule(pattern, spec, default) for pattern, spec in (rules or {}).items()]
    parameters = _named(model)
    trainable = [p for p in parameters if p.tensor.requires_grad]
    if not trainable:
        raise ValueError("param_groups: the model has no trainable parameters; set requires_grad=True on some.")

    frozen = [p.names for p in parameters if not p.tensor.requires_grad]
    takers = first_matches([p.names for p in trainable], frozen, parsed)
    decisions = [_decide(parameter, rule, default) for parameter, rule in zip(trainable, takers, strict=True)]
    for rule in parsed:
        _check_effect(rule, [decision for decision, taker in zip(decisions, takers, strict=True) if taker is rule])
    if default.grid is not None and all(decision.scheme.grid is None for decision in decisions):
        raise ValueError(
            f"param_groups(bits={bits!r}): nothing is left to quantize, every parameter stays in float; name what to "
            "quantize in rules, or pass bits=None."
        )
    _check_group_sizes(decisions)
    return _assemble(decisions)


def _named(model: nn.Module) -> list[_Parameter]:
    """The parameters of the model, each once whatever its number of names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors: dict[int, nn.Parameter] = {}
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if is_lazy(tensor):
            raise ValueError(f"param_groups: {name!r} has no shape yet; run a batch through the model first.")
        tensors[id(tensor)] = tensor
        names.setdefault(id(tensor), []).append(name)
    parameters: list[_Parameter] = []
    for key, tensor in tensors.items():
        owners = [modules[name.rpartition(".")[0]] for name in names[key]]
        parameters.append(_Parameter(tensor, tuple(names[key]), _why_float(tensor, names[key], owners)))
    return parameters


def _why_float(tensor: nn.Parameter, names: list[str], owners: list[nn.Module]) -> str:
    """Why a parameter is kept in float unless a rule says otherwise; "" for a layer's weight."""
    last_parts = [name.rpartition(".")[2] for name in names]
    if any(isinstance(o, _NORMALISATIONS) or _NORMALISATION_NAME.search(type(o).__name__) for o in owners):
        return NORMALISATION
    if any("bias" in part for part in last_parts):
        return BIAS
    if any(isinstance(owner, nn.Embedding | nn.EmbeddingBag) for owner in owners):
        return EMBEDDING
    if tensor.ndim < 2 or not any("weight" in part for part in last_parts):
        return OTHER
    return ""


def _decide(parameter: _Parameter, rule: Rule | None, default: Scheme) -> _Decision:
    scheme = default if rule is None else rule.scheme
    if rule is None or not rule.gives_bits:
        reason = parameter.reason or ("bits=None" if scheme.grid is None else "")
    elif scheme.grid is None:
        reason = f"rule {rule.pattern!r}"
    else:
        named = rule.spells_out(parameter.names, module=parameter.reason == NORMALISATION)
        reason = parameter.reason if parameter.guarded and not named else ""
    # Float weights take the default granularity and solver, so that all of them share a group.
    return _Decision(parameter, default._replace(grid=None) if reason else scheme, reason)


def _check_effect(rule: Rule, taken: list[_Decision]) -> None:
    """Refuse a rule that asks for quantization and quantizes nothing."""
    if (rule.gives_bits and rule.scheme.grid is None) or any(decision.scheme.grid is not None for decision in taken):
        return
    kept = ", ".join(f"{d.parameter.names[0]!r} ({d.reason.partition(':')[0]})" for d in taken[:8])
    kept += f" and {len(taken) - 8} more" if len(taken) > 8 else ""
    # A rule with bits fails on guarded parameters alone; the others it would have quantized.
    remedy = f"spell out the name, as in {taken[0].parameter.names[0]!r}," if rule.gives_bits else "give the rule bits"
    raise ValueError(
        f"param_groups: rule {rule.pattern!r} quantizes nothing, it takes only {kept}; "
        f"{remedy} to quantize such a parameter, or drop the rule."
    )


def _check_group_sizes(decisions: list[_Decision]) -> None:
    """Refuse group sizes that do not divide, all at once."""
    bad: list[str] = []
    remedy: dict[str, dict[str, str]] = {}
    for parameter, (grid, granularity, _), _ in decisions:
        shape = parameter.tensor.shape
        inputs = shape[1:].numel() if len(shape) > 1 else shape.numel()
        if grid is not None and isinstance(granularity, int) and inputs % granularity:
            bad.append(f"{parameter.names[0]!r} ({inputs} by {granularity})")
            remedy = remedy or {parameter.names[0]: {"bits": grid.name, "granularity": "channel"}}
    if bad:
        raise ValueError(
            f"param_groups: the group size does not divide the inputs per output of {', '.join(bad)}; choose another, "
            f"or put a rule with granularity 'channel' first, such as rules={remedy}."
        )


def _assemble(decisions: list[_Decision]) -> list[dict[str, Any]]:
    groups: dict[Scheme, dict[str, Any]] = {}
    for parameter, scheme, reason in decisions:
        group = groups.setdefault(
            scheme,
            {
                "params": [],
                "param_names": [],
                "grid": None if scheme.grid is None else scheme.grid.name,
                "granularity": scheme.granularity,
                "solver": scheme.solver,
                "notes": [],
            },
        )
        tie = f"tied with {', '.join(parameter.names[1:])}" if len(parameter.names) > 1 else ""
        group["params"].append(parameter.tensor)
        group["param_names"].append(parameter.names[0])
        group["notes"].append("; ".join(note for note in (reason, tie) if note))
    return sorted(groups.values(), key=lambda group: group["grid"] is None)
