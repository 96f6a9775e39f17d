"""Settings of runs: which of them tell runs apart, and the words for them."""

from collections.abc import Iterable, Mapping
from typing import Any

from blaq.grids import Grid
from blaq.report.read import Run
from blaq.train import toml
from blaq.train.config import RuleConfig

METHOD_NAMES = {
    "float": "float32",
    "bwn": "BWN",
    "laq": "LAQ",
    "blaq": "BLAQ",
    "past": "Past",
    "delayed": "Delayed",
}
SETTING_NAMES = {"optim.period": "m", "optim.lr": "learning rate", "optim.trial_every": "trial every"}

RULES = "optim.rules."  # and the pattern
ORDER = "optim.rules"  # the patterns of several rules: the first that matches a layer wins

# What tells variants of a panel apart; all other settings tell panels apart.
OF_THE_METHOD = ("optim.method", "optim.a", "optim.period", "optim.trial_every", "optim.lr")
OF_THE_LENGTH = ("train.epochs", "optim.schedule_every", "optim.schedule_factor")
# What has no part in the numbers, or is what the seeds of a variant differ in.
NOT_COMPARED = ("name", "title", "train.seed", "train.threads")


def setting_text(name: str, value: Any) -> str:
    """A setting as in ``a = 0.6``; bits as in ``1 bit``.

    Example:
        >>> setting_text("optim.lr", 0.0005), setting_text("optim.bits", 2), setting_text("data.augment", False)
        ('learning rate = 0.0005', '2 bits (ternary)', 'augment = no')
        >>> setting_text("optim.rules.fc1", "4 bits (linear4)"), setting_text("optim.rules.fc1", None)
        ('fc1: 4 bits (linear4)', 'fc1: no rule')
    """
    if name.startswith(RULES):
        return f"{setting_name(name)}: {value or 'no rule'}"
    if name == ORDER:
        return f"rules in the order {', '.join(value or ())}"
    if name == "optim.bits":
        grid = Grid.parse(value)
        return f"{grid.bits} {'bit' if grid.bits == 1 else 'bits'} ({grid.name})"
    shown = {True: "yes", False: "no", None: "none"}.get(value) if value is None or isinstance(value, bool) else None
    text = shown or (f"{value:g}" if isinstance(value, float) else str(value))
    return f"{setting_name(name)} = {text}"


def setting_name(name: str) -> str:
    """The words for a setting; a rule is called by its pattern.

    Example:
        >>> setting_name("optim.period"), setting_name("optim.weight_decay"), setting_name("optim.rules.fc1.weight")
        ('m', 'weight decay', 'fc1.weight')
    """
    if name.startswith(RULES):
        return name.removeprefix(RULES)
    return SETTING_NAMES.get(name, name.rpartition(".")[2].replace("_", " "))


def method_name(method: str) -> str:
    """How a method is called in text."""
    return METHOD_NAMES.get(method, method)


def read_settings(run: Run) -> dict[str, Any]:
    """The settings of a run by dotted name, without those that its method does not read or that change no number."""
    ignored = {f"optim.{name}" for name in run.recipe.optim.trains_by.ignores}
    tree = toml.to_tree(run.recipe)
    tree["optim"]["rules"] = {pattern: _rule_text(rule) for pattern, rule in run.recipe.optim.rules.items()}
    flat = dict(_flat(tree))
    if len(run.recipe.optim.rules) > 1:
        flat[ORDER] = tuple(run.recipe.optim.rules)
    if "optim.bits" in flat:
        flat["optim.bits"] = Grid.parse(flat["optim.bits"]).name
    return {
        name: value
        for name, value in flat.items()
        if name not in NOT_COMPARED and not name.startswith("probes.") and not _within(name, ignored)
    }


def _rule_text(rule: int | str | RuleConfig) -> str:
    """What a rule states, in the same words however it is written: a table with bits alone is a grid."""
    stated = rule.settings() if isinstance(rule, RuleConfig) else {"bits": rule}
    return " and ".join(
        "float" if value == "float" else setting_text(f"optim.{name}", value) for name, value in stated.items()
    )


def _within(name: str, ignored: Iterable[str]) -> bool:
    """Whether a setting, or the table that it is in, is among others: a rule is in the table of rules."""
    return any(name == other or name.startswith(f"{other}.") for other in ignored)


def _flat(tree: Mapping[str, Any], at: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", tuple(value) if isinstance(value, list) else value
