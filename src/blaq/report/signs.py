"""The known failure signs: what shows them, and what to try."""

import math
from collections.abc import Iterator, Sequence

from blaq.report import rules
from blaq.report.contrast import Comparison, late_zigzag
from blaq.report.panels import Task, Variant
from blaq.report.read import Run, Sweep
from blaq.report.words import MINUS, Statement

PROBE = "--set probes.every=10"
MOST_MESSAGES = 6
_RISEN = f"more than {rules.RISEN:g} times its lowest, with over {100 * rules.LOST:g} % of the fall from the first epoch lost"

_DIVERGENCE_ADVICE = (
    "Try a lower learning rate (optim.lr), a bound on the latent weights (optim.clip=1), a nearer to 1, or more bits for the "
    "first and last layer (optim.rules)."
)


def signs(variant: Variant, at_steps: Comparison | None) -> list[Statement]:
    """The failure signs that a variant shows."""
    found = [*own_signs(variant)]
    if at_steps is None or variant.runs[0].recipe.optim.trains_by.trial not in ("fresh", "past"):
        return found  # what is left is about looking ahead
    control = at_steps.control
    own, laq = variant.band("train_loss"), control.band("train_loss")
    ratio = rules.slower(own.axes["steps"], own.mean, laq.axes["steps"], laq.mean)
    if rules.is_slow(ratio):
        found.append(_slow(variant, control, ratio))
    if at_steps.standing(at_steps.main) in ("level", "behind"):
        found += _no_gain(variant, control)
    return found


def failed(sweeps: Sequence[Sweep]) -> Iterator[Statement]:
    """Which runs failed, and the message of each; runs with the same message together."""
    for sweep in sweeps:
        if not sweep.failures:
            continue
        together: dict[str, list[str]] = {}
        for name, why in sweep.failures.items():
            together.setdefault(why, []).append(name)
        messages = [f"{', '.join(names)}: {why}" for why, names in together.items()]
        rest = f"; and {len(messages) - MOST_MESSAGES} more messages" if len(messages) > MOST_MESSAGES else ""
        count = len(sweep.failures)
        yield Statement(
            "sign",
            f"{count} {'run' if count == 1 else 'runs'} of {sweep.path.resolve().name} failed",
            f"{'; '.join(messages[:MOST_MESSAGES])}{rest}".removesuffix(".") + ".",
            "All messages are in its results.json, what a run's process wrote in the run's output.txt.",
        )


def broken_off(task: Task) -> Iterator[Statement]:
    """What the runs that do not count show: without a result, or without metrics."""
    begun = [run for run in task.unfinished if run.result is None]
    if begun:
        names = [f"{run.name} ({run.epochs} of {run.recipe.train.epochs} epochs)" for run in begun]
        yield Statement(
            "note",
            f"{len(names)} {'run is' if len(names) == 1 else 'runs are'} not finished and left out",
            f"{_first(names)}.",
            "Continue with `blaq train RUN/recipe.toml --out RUN --resume`, or repeat the command of the comparison.",
        )
    yield from without_metrics(task.unfinished)
    rising = [run for run in task.unfinished if rules.diverges(run.metrics.get("train_loss", ()))]
    if rising:
        yield Statement(
            "sign",
            f"Divergence: the training loss was rising where {', '.join(run.name for run in rising[:6])} broke off",
            f"It ended at {_RISEN}.",
            _DIVERGENCE_ADVICE,
        )


def without_metrics(runs: Sequence[Run]) -> Iterator[Statement]:
    """Which runs have their result but have lost what led to it."""
    lost = [run for run in runs if run.result is not None and not run.counts]
    if lost:
        yield Statement(
            "note",
            f"{len(lost)} {'run has a result' if len(lost) == 1 else 'runs have a result'} but no metrics and "
            f"{'is' if len(lost) == 1 else 'are'} left out",
            f"{_first([run.name for run in lost])}: metrics.jsonl is missing or empty.",
            "Put the file back, or delete the run's directory and make the run again.",
        )


def _first(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - MOST_MESSAGES} more" if len(names) > MOST_MESSAGES else ""
    return ", ".join(names[:MOST_MESSAGES]) + more


def other_data(task: Task) -> Iterator[Statement]:
    """Which runs of the same `data` settings saw other data than most, or than the first: their differences are not the
    methods' alone.
    """
    together: dict[str, dict[str, list[Run]]] = {}
    for run in task.runs:
        if run.data:
            seen = together.setdefault(repr(run.recipe.data), {})
            seen.setdefault(repr(sorted(run.data.items())), []).append(run)
    for seen in together.values():
        most, *others = sorted(seen.values(), key=len, reverse=True)
        for runs in others:
            ours, theirs = runs[0].data, most[0].data
            changed = [f"{name} {ours.get(name, 'not noted')}, not {theirs.get(name, 'noted')}"
                       for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]  # fmt: skip
            named = ", ".join(run.name for run in runs[:MOST_MESSAGES]) + (", .." if len(runs) > MOST_MESSAGES else "")
            yield Statement(
                "sign",
                f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} saw other data under the same settings",
                f"{named}: {', '.join(changed)} as {most[0].name} has. Differences between them are not the methods' alone.",
                "Make them again with the data of the others.",
            )


def own_signs(variant: Variant) -> Iterator[Statement]:
    """Divergence, which needs no other variant to show."""
    rising = [run for run in variant.runs if rules.diverges(run.metrics.get("train_loss", ()))]
    if rising:
        yield Statement(
            "sign",
            f"Divergence: the training loss of {variant.label} rises at the end",
            f"In {len(rising)} of {len(variant.runs)} runs it ends at {_RISEN}.",
            _DIVERGENCE_ADVICE,
        )
    band = variant.zigzag_band("gradient_error")
    ratio = rules.growth(band.mean) if band is not None else math.nan
    if rules.piles_up(ratio):
        yield Statement(
            "sign",
            f"The quantization error piles up: the gradient error of {variant.label} grows",
            f"In the last third of training it is {ratio:.1f} times that in the first (a sign above {rules.PILED_UP:g}).",
            _DIVERGENCE_ADVICE,
        )


def _slow(variant: Variant, control: Variant, ratio: float) -> Statement:
    times = f"needs {ratio:.1f} times the steps" if math.isfinite(ratio) else "does not come in its whole run"
    joined = "to come" if math.isfinite(ratio) else ""
    return Statement(
        "sign",
        f"Slow convergence: {variant.label} falls behind {control.label} from the start",
        f"It {times} {joined} to the training loss that {control.label} has at half of its run (a sign above {rules.SLOW:g} "
        "times).".replace("  ", " "),
        "a or the learning rate is off: averaging two gradients shortens the step. Try a from 0.6 to 0.875, and a learning "
        "rate of its own: `blaq ablate RECIPE --set optim.a=0.6:0.9:0.1 --set optim.lr=...`.",
    )


def _no_gain(variant: Variant, control: Variant) -> Iterator[Statement]:
    rates, cosines = (
        [late_zigzag(of, name) for of in (control, variant)] for name in ("zigzag_rate", "gradient_cosine")
    )
    laq, own = (rules.turning(rate, cosine) for rate, cosine in zip(rates, cosines, strict=True))
    fresh = variant.runs[0].recipe.optim.trains_by.trial == "fresh"
    found, found_own = (
        f"{rate:.1%} of {of.label}'s updates turn back in the second half of training, and the cosine of its successive "
        f"gradients is {cosine:.2f}".replace("%", " %").replace("-", MINUS)
        for of, rate, cosine in zip((control, variant), rates, cosines, strict=True)
    )
    if math.isnan(laq) or math.isnan(own):
        yield Statement(
            "note",
            f"No gain over {control.label}: whether there was zig-zag to remove is not known",
            "These runs were not probed.",
            f"Repeat with `{PROBE}`.",
        )
    elif rules.little_zigzag(laq):
        yield Statement(
            "sign",
            f"No gain of {variant.label} over {control.label}: little zig-zag to remove",
            f"{found} (a sign: at most {rules.LITTLE_ZIGZAG:.0%} turn back, and a cosine above "
            f"{MINUS}{rules.LITTLE_ZIGZAG:g}).".replace("0%", "0 %"),
            # Only a second gradient in a step is one that LAQ could have used.
            ("Plain LAQ is the better use of the gradients here: train longer with it. " if fresh else "")
            + "Fewer bits or a higher learning rate make more zig-zag.",
        )
    else:
        fell = rules.zigzag_fell(own, laq)
        yield Statement(
            "sign",
            f"No gain of {variant.label} over {control.label}, {'though zig-zag fell' if fell else 'and zig-zag hardly fell'}",
            f"{found}; {found_own}.",
            "Here zig-zag is not what holds training back; look at the learning rate and the number of bits first."
            if fell
            else "Try a smaller a (0.6 to 0.75) and a trial in every step (optim.period=1, optim.trial_every=1).",
        )
