"""The verdict: what the numbers allow to say, in words, and what to try when a known failure shows."""

import math
from collections.abc import Iterator, Sequence

from blaq.report import rules
from blaq.report.contrast import AXIS_WORDS, Comparison, best, challengers, compare, passed_over
from blaq.report.panels import Panel, Task, Variant
from blaq.report.settings import method_name
from blaq.report.signs import own_signs, signs
from blaq.report.words import Statement, Tone, difference_text, joined, plain, points
from blaq.train.statistics import paired


def verdict(panel: Panel, *, text: bool) -> list[Statement]:
    """The statements about a panel; the method's own best settings are those of the lowest validation error.

    Args:
        panel: the variants.
        text: whether the cross-entropy is the main measure, as for characters.
    """
    rivals = challengers(panel, text=text)
    statements: list[Statement] = []
    if rivals and not panel.controls:
        statements.append(_no_control(rivals))
    if not rivals:
        statements.append(_no_challenger(panel))
    for variant in rivals:
        at_steps, at_gradients = (compare(variant, panel, axis, text=text) for axis in AXIS_WORDS)
        statements += _standings(at_steps, at_gradients, text=text)
        if at_steps is not None and at_gradients is None:
            statements.append(_no_gradient_control(variant))
        statements += signs(variant, at_steps)
    control = best(panel.controls, text=text)
    statements += own_signs(control) if control is not None else ()
    statements += _float_cost(panel, text=text)
    statements += _selection(panel, rivals, text=text)
    statements += _passed_over(passed_over(panel, rivals))
    return list({statement.head: statement for statement in statements}.values())


def headline(task: Task) -> list[str]:
    """Where the methods stand to LAQ over the panels of a task, a line for each axis and those that stand alike."""
    lines = []
    methods = dict.fromkeys(v.method for p in task.panels for v in challengers(p, text=task.text))
    for axis, words in AXIS_WORDS.items():
        alike: dict[str, list[str]] = {}
        for method in methods:
            places: dict[str, list[str]] = {said: [] for said in _SAID.values()}  # in this order
            for panel in task.panels:
                for variant in challengers(panel, text=task.text):
                    found = compare(variant, panel, axis, text=task.text) if variant.method == method else None
                    if found is not None and found.main is not None:
                        said = _SAID.get(found.standing(found.main), found.early)
                        places.setdefault(said, []).append(panel.label)
            parts = [f"{said} at {', '.join(labels)}" for said, labels in places.items() if labels]
            if parts:
                alike.setdefault("; ".join(parts), []).append(method_name(method))
        lines += [f"{joined(names)} against LAQ at equal {words}: {said}." for said, names in alike.items()]
    return lines


_SAID: dict[rules.Standing, str] = {  # but for ``early``, which a comparison says itself
    "ahead": "ahead", "behind": "behind", "level": "no difference beyond seed noise",
    "flat": "the same difference in every seed, so no interval", "unknown": "no claim from one seed",
}  # fmt: skip
MOST_NAMED = 6


def _standings(at_steps: Comparison | None, at_gradients: Comparison | None, *, text: bool) -> Iterator[Statement]:
    """One statement where steps and gradients are equal at once, else one for each; that about the ends of the runs first."""
    both = [found for found in (at_steps, at_gradients) if found is not None]
    if len(both) == 2 and all(found.at_end for found in both) and both[0].control is both[1].control:
        yield _standing(both[0], " and ".join(AXIS_WORDS.values()), text=text)
    else:
        both.sort(key=lambda found: not found.at_end)
        yield from (_standing(found, AXIS_WORDS[found.axis], text=text) for found in both)


def _standing(comparison: Comparison, words: str, *, text: bool) -> Statement:
    one, other = comparison.variant.label, comparison.control.label
    if comparison.main is None or comparison.loss is None:
        if set(comparison.variant.seeds) & set(comparison.control.seeds):
            return Statement(
                "note",
                f"{one} and {other} cannot be set against each other at equal {words}",
                f"The shorter runs end at {comparison.point:,.0f} {words}, before the first epoch of the longer ones.",
                "Train for more epochs, or `blaq compare ... --budget gradients`.",
            )
        return Statement(
            "note",
            f"{one} and {other} share no seed to pair at equal {words}",
            f"{one} has the seeds {_seeds(comparison.variant)}, {other} {_seeds(comparison.control)}.",
            "Run both with the same seeds.",
        )
    standing = comparison.standing(comparison.main)
    heads: dict[rules.Standing, str] = {
        "ahead": f"{one} is ahead of {other} at equal {words}, beyond seed noise",
        "behind": f"{one} is behind {other} at equal {words}, beyond seed noise",
        "level": f"{one} and {other} do not differ beyond seed noise at equal {words}",
        "flat": f"{one} and {other} have the same difference in every seed at equal {words}: no interval, so no claim",
        "early": f"{one} and {other} at equal {words}: {comparison.early}",
        "unknown": f"One seed: no claim about {one} and {other} at equal {words}",
    }
    measure = ("test" if comparison.at_end else "validation") + (" loss" if text else " error")
    losses: dict[rules.Standing, str] = {"ahead": ", lower beyond seed noise", "behind": ", higher beyond seed noise"}
    sentence = (
        f"{measure.capitalize()} {difference_text(comparison.main, plain if text else points)}; training loss "
        f"{difference_text(comparison.loss, plain)}{losses.get(comparison.standing(comparison.loss), '')}."
    )
    more: dict[rules.Standing, str] = {
        "unknown": "Add seeds: `blaq compare ... --seeds 5`.", "flat": "More seeds would show how far it varies.",
    }  # fmt: skip
    advice = more.get(standing, "")
    if not comparison.at_end:
        sentence += f" Read off the curves at {comparison.point:,.0f} {words}, the end of the shorter runs."
        if comparison.early:
            sentence += " The learning rate of the longer ones had not finished its schedule there."
        if comparison.axis == "gradient_evaluations":
            advice = f"{advice} For runs that end at equal gradients: `blaq compare ... --budget gradients`.".strip()
    tone: Tone = standing if standing in ("ahead", "behind", "level") else "note"
    return Statement(tone, heads[standing], sentence, advice)


def _seeds(variant: Variant) -> str:
    return ", ".join(map(str, variant.seeds))


def _no_control(rivals: Sequence[Variant]) -> Statement:
    names = " and ".join(method_name(variant.method) for variant in rivals)
    return Statement(
        "note",
        f"No LAQ run to set {names} against",
        "Whether the step back helps shows only beside LAQ (a = 1) with the same seeds.",
        "Add them: `blaq compare RECIPE --methods laq,blaq`, or `blaq train RECIPE --set optim.method=laq`.",
    )


def _no_challenger(panel: Panel) -> Statement:
    names = " and ".join(variant.label for variant in panel.variants)
    return Statement(
        "note",
        f"{names} alone: nothing to compare",
        "A verdict needs another method with the same seeds.",
        "Add one: `blaq compare RECIPE --methods laq,blaq --seeds 3`.",
    )


def _no_gradient_control(variant: Variant) -> Statement:
    return Statement(
        "note",
        f"No LAQ run with one gradient a step to set {variant.label} against at equal gradient evaluations",
        "a = 1 with a second gradient is LAQ's path at twice its cost.",
        "Add LAQ: `blaq compare RECIPE --methods laq,blaq --budget gradients`.",
    )


def _float_cost(panel: Panel, *, text: bool) -> Iterator[Statement]:
    full = best([variant for variant in panel.variants if not variant.quantized], text=text)
    control = best(panel.controls, full.seeds if full is not None else None, text=text)
    if full is None or control is None:
        return
    field, show = ("test_loss", plain) if text else ("test_error", points)
    cost = paired(control.results(field), full.results(field))
    smaller = control.mean("float_bytes") / control.mean("bytes")
    if cost is not None and not math.isnan(smaller):
        noise = ", within seed noise" if rules.standing(cost) == "level" else ""
        steps = [of.mean("steps") for of in (control, full)]
        lengths = (
            "" if rules.equal_lengths(*steps) else f", after {steps[0]:,.0f} steps where float32 took {steps[1]:,.0f}"
        )
        yield Statement(
            "note",
            f"{control.label} weights are {smaller:.0f} times smaller than float32",
            f"Against float32 they cost {difference_text(cost, show)} of test {'loss' if text else 'error'}{noise}{lengths}.",
        )


def _selection(panel: Panel, rivals: Sequence[Variant], *, text: bool) -> Iterator[Statement]:
    """How many of all settings are ahead or behind, on the axis where most allow a claim, and how many would be by chance."""
    tried = [variant for variant in panel.variants if variant.quantized and not variant.control]
    if len(tried) <= len(rivals) or not panel.controls:
        return
    claims: dict[str, list[rules.Standing]] = {}
    for axis, words in AXIS_WORDS.items():
        found = [compare(variant, panel, axis, text=text) for variant in tried]
        standings = [of.standing(of.main) for of in found if of is not None]
        claims[words] = [standing for standing in standings if standing in ("ahead", "behind", "level")]
    words, standings = max(claims.items(), key=lambda item: len(item[1]))
    if not standings:  # of single seeds nothing can be counted
        return
    ahead, behind = standings.count("ahead"), standings.count("behind")
    yield Statement(
        "note",
        f"Of {len(standings)} settings {ahead} {'is' if ahead == 1 else 'are'} ahead of LAQ at equal {words} and {behind} "
        "behind",
        f"By chance alone about {rules.by_chance(len(standings)):g} would be on either side. The statements above are about "
        "each method's settings with the lowest validation error.",
    )


def _passed_over(variants: Sequence[Variant]) -> Iterator[Statement]:
    if not variants:
        return
    listed = "; ".join(f"{variant.label} (seeds {_seeds(variant)})" for variant in variants[:MOST_NAMED])
    more = f"; and {len(variants) - MOST_NAMED} more" if len(variants) > MOST_NAMED else ""
    count = len(variants)
    yield Statement(
        "note",
        f"{count} {'setting is' if count == 1 else 'settings are'} passed over for missing, failed or other seeds",
        f"{listed}{more}. Only settings with the most seeds speak for a method, of LAQ those with the most in common with it.",
        "Run the missing seeds: repeat the command of the comparison.",
    )
