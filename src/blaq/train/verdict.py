"""The closing line: what is ahead of what, and never more than the intervals allow."""

from blaq.train.budget import Budget
from blaq.train.statistics import Difference
from blaq.train.summary import Group, Measure, Setting


def judge(group: Group, measure: Measure, budget: Budget, *, several: bool = False) -> str:
    """What the numbers of a group say about its methods, in one line."""
    where = f" ({group.title})" if several else ""
    if group.reference is None:
        return f"Look at {measure.name}{where}: one method alone; run another with the same seeds to compare it with."
    name, reference = group.reference_name, group.reference
    mean = reference.sample(measure.field).show(measure.digits)
    parts = [f"{name} has {mean}{measure.unit}"]
    judged = list(zip(group.settings, group.differences(measure.field), strict=True))
    for phrase, verdict in (("ahead of it", "lower"), ("behind it", "higher")):
        found = [
            f"{setting.name} by {difference.show(measure.digits).lstrip('+-')}"
            for setting, difference in judged
            if difference is not None and difference.verdict == verdict
        ]
        if found:
            parts.append(f"{phrase}: {_and(found)}")
    unjudged: dict[str, list[str]] = {phrase: [] for phrase in _UNJUDGED}
    for setting, difference in judged:
        if setting is not reference and (phrase := _why_open(difference)):
            shown = "" if difference is None else f" ({difference.show(measure.digits)})"
            unjudged[phrase].append(f"{setting.name}{shown}")
    parts += [f"{phrase}: {_and(names)}" for phrase, names in unjudged.items() if names]
    return f"Look at {measure.name}{where}: {'; '.join(parts)} [{_basis(group, measure, budget)}].{_cost(group)}"


def _basis(group: Group, measure: Measure, budget: Budget) -> str:
    """Where the intervals come from, and what they cannot tell."""
    found = [difference for difference in group.differences(measure.field) if difference is not None]
    pairs = sorted({len(difference.values) for difference in found})
    equal = "equal steps" if budget == "steps" else "equal gradient evaluations"
    if not pairs:
        return f"no seed in common; {equal}"
    if pairs == [1]:
        return f"a single seed, which cannot tell anything from seed noise; {equal}"
    seeds = " or ".join(map(str, pairs))
    without = any(len(difference.values) > 1 and not difference.spread for difference in found)
    note = "; differences without any spread have no interval" if without else ""
    return f"95 % intervals, paired t, {seeds} seeds{note}; {equal}"


_OPEN, _FLAT, _APART = _UNJUDGED = (
    "no difference beyond seed noise shown",
    "the same difference in every seed, so no claim",
    "without a seed in common with it",
)


def _why_open(difference: Difference | None) -> str:
    """Why a difference is neither ahead nor behind; empty if it is one of them."""
    if difference is None:
        return _APART
    if difference.verdict != "open":
        return ""
    return _FLAT if difference.flat else _OPEN


def _cost(group: Group) -> str:
    """Gradients where they differ from the reference's, and how much smaller the weights are."""
    assert group.reference is not None
    base = group.reference.sample("gradient_evaluations").mean
    ratios = [
        (setting.values["method"], setting.sample("gradient_evaluations").mean / base) for setting in group.settings
    ]
    costs = [f"{method} took {ratio:.2f} times the gradients" for method, ratio in ratios if abs(ratio - 1) >= 0.005]
    text = f" {_and(costs)} of {group.reference_name}." if costs else ""
    smaller = [one for one in map(_smaller, group.settings) if one > 1]
    return f"{text} Packed weights are {max(smaller):.1f} times smaller than float32." if smaller else text


def _smaller(setting: Setting) -> float:
    return setting.sample("float_bytes").mean / setting.sample("bytes").mean


def _and(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
