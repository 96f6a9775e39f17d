"""Rules: globs over parameter names, what they ask for, and which parameter each of them takes."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch

from blaq.grids import Grid
from blaq.projection import check_solver, row_shape

RULE_KEYS = ("bits", "granularity", "solver")
RuleSpec = str | int | Grid | None | Mapping[str, Any]
Names = tuple[str, ...]  # all names of one parameter, the canonical one first


class Scheme(NamedTuple):
    """How a parameter is stored; grid None is float."""

    grid: Grid | None
    granularity: str | int
    solver: str


@dataclass(frozen=True, slots=True)
class Rule:
    """A pattern and what it asks for, defaults filled in.

    Attributes:
        pattern: a glob, case-sensitive; ``*`` crosses dots.
        scheme: of what the rule quantizes; grid None keeps float.
        gives_bits: False for a rule that sets granularity or solver alone, and leaves open what is quantized.
    """

    pattern: str
    scheme: Scheme
    gives_bits: bool

    def matches(self, names: Names) -> bool:
        """Whether the pattern fits the parameter or a module around it, under any of its names.

        Example:
            >>> Rule("conv*", Scheme(None, "tensor", "exact"), gives_bits=True).matches(("conv1.weight",))
            True
        """
        return any(fnmatchcase(name, self.pattern) or self._matches_module(name) for name in names)

    def spells_out(self, names: Names, *, module: bool = False) -> bool:
        """Whether the pattern names the parameter itself, not just everything in some module.

        With ``module`` it must name the parameter's own module as well, without a wildcard.

        Example:
            >>> rules = [Rule(pattern, Scheme(None, "tensor", "exact"), gives_bits=True)
            ...          for pattern in ("fc.bias", "*.bias", "fc", "f*", "fc.*")]
            >>> [rule.spells_out(("fc.bias",)) for rule in rules]
            [True, True, False, False, False]
            >>> [rule.spells_out(("fc.bias",), module=True) for rule in rules]
            [True, False, False, False, False]
        """
        owner, _, last_part = self.pattern.rpartition(".")
        if not last_part.strip("*?") or (module and set(owner.rpartition(".")[2]) & set("*?[")):
            return False
        return any(
            fnmatchcase(name, self.pattern)
            and fnmatchcase(name.rpartition(".")[2], last_part)
            and not self._matches_module(name)
            for name in names
        )

    def _matches_module(self, name: str) -> bool:
        return any(fnmatchcase(name[: dot.start()], self.pattern) for dot in re.finditer(r"\.", name))


def parse_rule(pattern: str, spec: RuleSpec, default: Scheme) -> Rule:
    """The rule that a user wrote as ``pattern: spec``.

    Raises:
        ValueError: an unknown key, a bad grid, granularity or solver, options for float weights.

    Example:
        >>> parse_rule("fc*", {"bits": 4, "granularity": "channel"}, Scheme(None, "tensor", "exact"))
        Rule(pattern='fc*', scheme=Scheme(grid=Grid('linear4'), granularity='channel', solver='exact'), gives_bits=True)
    """
    owner = f"param_groups: rule {pattern!r}"
    if not isinstance(pattern, str):
        raise ValueError(f"{owner}: expected a glob for parameter or module names, such as 'conv1' or '*.bias'.")
    if not isinstance(spec, Mapping):
        return Rule(pattern, default._replace(grid=grid_or_float(spec, owner)), gives_bits=True)
    if not spec:
        raise ValueError(f"{owner}: expected some of the keys 'bits', 'granularity', 'solver'; None keeps float.")
    for key in spec:
        if key not in RULE_KEYS:
            near = difflib.get_close_matches(str(key), RULE_KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "expected 'bits', 'granularity' or 'solver'."
            raise ValueError(f"{owner}: unknown key {key!r}; {hint}")
    grid = grid_or_float(spec["bits"], owner) if "bits" in spec else default.grid
    scheme = Scheme(grid, spec.get("granularity", default.granularity), spec.get("solver", default.solver))
    check_scheme(scheme, owner)
    if grid is None and len(spec) > ("bits" in spec):
        raise ValueError(f"{owner}: float weights have no granularity or solver; give it bits, or only 'float'.")
    return Rule(pattern, scheme, gives_bits="bits" in spec)


def grid_or_float(spec: object, owner: str) -> Grid | None:
    """The grid that is meant; None for None and ``"float"``."""
    if spec is None or spec == "float":
        return None
    try:
        return Grid.parse(spec)  # type: ignore[arg-type]  # it refuses what it cannot parse
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from None


def check_scheme(scheme: Scheme, owner: str) -> None:
    """Refuse an unknown granularity or solver."""
    # Every group size divides an empty weight: this checks the granularity itself, before any weight is looked at.
    row_shape(torch.Size([0]), scheme.granularity, owner)
    check_solver(scheme.solver, owner)


def first_matches(trainable: Sequence[Names], frozen: Sequence[Names], rules: Sequence[Rule]) -> list[Rule | None]:
    """The rule that takes each trainable parameter, the first that matches; None where none does.

    Raises:
        ValueError: a rule that matches nothing, or nothing that the rules before it leave.
    """
    takers = [next((rule for rule in rules if rule.matches(names)), None) for names in trainable]
    for rule in rules:
        owner = f"param_groups: rule {rule.pattern!r}"
        rivals = [taker for names, taker in zip(trainable, takers, strict=True) if rule.matches(names)]
        if not rivals:
            still = [names[0] for names in frozen if rule.matches(names)]
            if still:
                raise ValueError(
                    f"{owner} matched only frozen parameters: {_listed(still)}; "
                    "set requires_grad=True on them or drop the rule."
                )
            raise ValueError(f"{owner} matched no parameter; {_nearest(rule, trainable)}")
        if all(taker is not rule for taker in rivals):
            earlier = list(dict.fromkeys(taker.pattern for taker in rivals if taker is not None))
            raise ValueError(
                f"{owner} has no effect: {_listed(earlier, 'and')} before it "
                f"{'takes' if len(earlier) == 1 else 'take'} all that it matches; move it up or drop it."
            )
    return takers


def _nearest(rule: Rule, trainable: Sequence[Names]) -> str:
    """What the user may have meant by a pattern that matches nothing."""
    deeper = Rule(f"*.{rule.pattern}", rule.scheme, rule.gives_bits)
    if any(deeper.matches(names) for names in trainable):
        return f"did you mean {deeper.pattern!r}?"
    flat = [name for names in trainable for name in names]
    if "." in rule.pattern:
        known = dict.fromkeys(name[: end.start()] for name in flat for end in re.finditer(r"\.|$", name))
        near = difflib.get_close_matches(rule.pattern, known, n=3)
        if near:
            return f"did you mean {_listed(near, 'or')}?"
    return f"names start with {_listed(list(dict.fromkeys(name.partition('.')[0] for name in flat)))}."


def _listed(names: Sequence[str], last: str = "", limit: int = 12) -> str:
    """``'a', 'b' and 'c'``, cut after some."""
    quoted = [repr(name) for name in names[:limit]]
    if len(names) > limit:
        return ", ".join(quoted) + f" and {len(names) - limit} more"
    if last and len(quoted) > 1:
        return ", ".join(quoted[:-1]) + f" {last} {quoted[-1]}"
    return ", ".join(quoted)
