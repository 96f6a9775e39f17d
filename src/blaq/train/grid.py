"""Ablations: which settings a ``--set KEY=VALUES`` stands for, and the runs of all their combinations."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from urllib.parse import quote

from blaq.grids import Grid
from blaq.train import toml
from blaq.train.config import METHODS, OptimConfig, Recipe, RuleConfig
from blaq.train.sweep import Job

MOST_VALUES = 10_000
METHOD = "optim.method"
GRID = "optim.bits"


def parse_values(text: str) -> tuple[str, list[str]]:
    """Key and values of ``key=value,value,start:stop:step``: a list, in which ranges hold both ends.

    Numbers of a range are decimal, so that no binary rounding shows. A comma inside brackets, braces or quotes belongs to
    its value.

    Raises:
        ValueError: no ``=``, no value, a value named twice, a range whose steps do not meet its end.

    Example:
        >>> parse_values("optim.a=0:0.4:0.1,1")
        ('optim.a', ['0', '0.1', '0.2', '0.3', '0.4', '1'])
        >>> parse_values("optim.betas=[0.9, 0.99],[0.9, 0.999]")
        ('optim.betas', ['[0.9, 0.99]', '[0.9, 0.999]'])
    """
    key, equals, written = text.partition("=")
    values = [value for part in _parts(written) for value in _range(part.strip(), text)]
    if not equals or not key.strip() or "" in values:
        raise ValueError(f"--set {text}: expected key=value, key=value,value or key=start:stop:step.")
    if len(set(values)) < len(values):
        raise ValueError(f"--set {text}: expected each value once.")
    return key.strip(), values


def _parts(text: str) -> Iterator[str]:
    """Split at the commas outside brackets, braces and quotes."""
    depth, quoted, part = 0, "", ""
    for character in text:
        if quoted:
            quoted = "" if character == quoted else quoted
        elif character in "\"'":
            quoted = character
        else:
            depth += (character in "[{(") - (character in "]})")
        if character == "," and not depth and not quoted:
            yield part
            part = ""
        else:
            part += character
    yield part


def _range(part: str, text: str) -> list[str]:
    """The values of ``start:stop:step``; what has not that form is one value."""
    if not re.fullmatch(r"[^:\"'\[{]+:[^:]+:[^:]+", part):
        return [part]
    try:
        start, stop, step = (Decimal(number.strip()) for number in part.split(":"))
        count = (stop - start) / step
    except (InvalidOperation, ZeroDivisionError):
        raise ValueError(f"--set {text}: {part}: expected three numbers start:stop:step, the step not 0.") from None
    if not count.is_finite() or count != count.to_integral_value() or not 0 <= count < MOST_VALUES:
        raise ValueError(
            f"--set {text}: {part}: expected a stop that whole steps reach from the start, in fewer than {MOST_VALUES}."
        )
    return [_plain(start + number * step) for number in range(int(count) + 1)]


def _plain(number: Decimal) -> str:
    """Without exponent and idle zeros: 0.3, 1, 0.0001."""
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def combinations(recipe: Recipe, sets: Mapping[str, Sequence[str]], seeds: Iterable[int]) -> list[Job]:
    """A run for every combination of values and every seed.

    A setting that a combination's method does not read is left out of it; combinations that come to the same by that are
    one run. ``optim.a=1`` is run for every period all the same: its weights are LAQ's, its cost is not.

    Raises:
        ValueError: an unknown key or value, values that do not fit together, a setting that no combination reads.
    """
    sets = {key: [unquoted(key, value) for value in values] for key, values in sets.items()}
    order = sorted(sets, key=lambda key: key != METHOD)  # the method first: it says what is read
    found: dict[tuple[tuple[str, str], ...], Recipe] = {}
    for values in itertools.product(*(sets[key] for key in order)):
        chosen = dict(zip(order, values, strict=True))
        method = chosen.get(METHOD, recipe.optim.method)
        ignores = METHODS[method].ignores if method in METHODS else frozenset()
        read = {key: value for key, value in chosen.items() if not _ignored(key, ignores)}
        settings = tuple((key, read.get(key, "")) for key in sets)
        if settings not in found:
            found[settings] = recipe.with_([f"{key}={value}" for key, value in read.items()])
    for key in sets:
        if all(not dict(settings)[key] for settings in found):
            next(iter(found.values())).with_([f"{key}={sets[key][0]}"])  # says which methods read it
    if len({_identity(variant) for variant in found.values()}) < len(found):
        raise ValueError("--set: two combinations are the same run; name each value once, in one form.")
    names = {key: quote(name, safe="") for key, name in short_names(sets).items()}
    return [
        Job(
            name="-".join([*(f"{names[key]}{quote(value, safe='')}" for key, value in settings if value), f"s{seed}"]),
            recipe=variant.with_([f"train.seed={seed}"]),
            settings=dict(settings),
        )
        for settings, variant in found.items()
        for seed in seeds
    ]


def _identity(recipe: Recipe) -> str:
    """The same text for recipes of the same run: a grid has several names."""
    optim = recipe.optim
    rules = {pattern: _one_form(rule, optim) for pattern, rule in optim.rules.items()}
    return replace(recipe, optim=replace(optim, bits=Grid.parse(optim.bits).name, rules=rules)).to_toml()


def _one_form(rule: int | str | RuleConfig, optim: OptimConfig) -> RuleConfig:
    """A rule as a table of all that it decides, with the name of its grid, however it was written."""
    table = rule if isinstance(rule, RuleConfig) else RuleConfig(bits=rule)
    bits = optim.bits if table.bits is None else table.bits
    return RuleConfig(
        bits=bits if bits == "float" else Grid.parse(bits).name,
        granularity=table.granularity if table.granularity is not None else optim.granularity,
        solver=table.solver if table.solver is not None else optim.solver,
    )


def unquoted(key: str, value: str) -> str:
    """A text without its quotes, if it is the same text without them."""
    _, meant = toml.split_override(Recipe, f"{key}={value}")
    same = isinstance(meant, str) and toml.split_override(Recipe, f"{key}={meant}")[1] == meant
    return meant if same else value


def _ignored(key: str, ignores: frozenset[str]) -> bool:
    section, setting, *_ = [*toml.split_override(Recipe, f"{key}=")[0], ""]
    return section == "optim" and setting in ignores


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """The last part of each key, where that is enough to tell them apart; else the whole keys.

    Example:
        >>> short_names(["optim.a", "optim.lr"])
        {'optim.a': 'a', 'optim.lr': 'lr'}
        >>> short_names(["optim.rules.fc1.bits", "optim.rules.fc2.bits"])
        {'optim.rules.fc1.bits': 'optim.rules.fc1.bits', 'optim.rules.fc2.bits': 'optim.rules.fc2.bits'}
    """
    short = {key: key.rpartition(".")[2] for key in keys}
    return short if len(set(short.values())) == len(short) else {key: key for key in short}
