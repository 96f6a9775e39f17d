"""Words and tables that the pages share."""

import re
import textwrap
from collections.abc import Sequence

from blaq.train.tables import markdown_table

WIDTH = 120
_KEPT = re.compile(r" (?=%|= |< |± )|(?<= [=<±]) ")  # spaces at which no line ends

NOISE = """\
`±` after a mean is the standard deviation over seeds. `±` after a difference is half of its own 95 % interval: Student's t
of the differences seed by seed. `p` pools the noise of the settings that stand beside it (value = setting + seed + noise)
and is corrected by Holm's method for the number of differences of that measure on this page: **beyond noise** is what stays
below 0.05 so. What only its own interval supports is called *suggested*: of twenty intervals around true zeros one leaves
zero out by chance."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return markdown_table({name: [row[index] for row in rows] for index, name in enumerate(head)})


def join(parts: Sequence[str], none: str = "none") -> str:
    """Parts in a row: a, b and c."""
    if not parts:
        return none
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def p_text(p: float) -> str:
    """A p-value in a table; a dash for NaN."""
    if p != p:
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def p_is(p: float) -> str:
    """A p-value in a sentence."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def document(sections: Sequence[str]) -> str:
    """A page of its sections; prose and lists in lines of a readable length."""
    return "\n\n".join(_wrapped(section) for section in sections if section) + "\n"


def _wrapped(section: str) -> str:
    if section.startswith(("#", "|", "```")):
        return section
    lines = section.splitlines() if section.startswith("- ") else [" ".join(section.split())]
    return "\n".join(
        textwrap.fill(_KEPT.sub("\0", line), WIDTH, subsequent_indent="  " * line.startswith("- "), break_long_words=False,
                      break_on_hyphens=False).replace("\0", " ")
        for line in lines
    )  # fmt: skip


def percent(value: float) -> str:
    """A share as a signed percentage."""
    return f"{100 * value:+z.0f} %"


def bits_text(bits: str) -> str:
    """A grid in words."""
    return f"{bits} bit{'s' * (bits != '1')}" if bits.isdecimal() else bits


def bullets(lines: Sequence[str]) -> str:
    """A list in Markdown."""
    return "\n".join(f"- {line}" for line in lines)
