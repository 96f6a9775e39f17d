"""The figures as files for a paper: PNG and SVG, on white, with their title."""

import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from blaq.report.figures import Figure, View

FORMATS = ("png", "svg")
SECONDS, SECONDS_EACH, ATTEMPTS = 60, 2, 2  # a browser may never answer; a new one does
WIDTH = 900  # pixels; PNG has twice as many in either direction
CHARACTERS = 92  # of a title on a line of that width

NO_BROWSER = (
    "report(figures={folder!r}): drawing PNG and SVG needs Chrome or Chromium, and none was found; install one (Debian: "
    "`apt install chromium`; anywhere: `plotly_get_chrome`), or name it in the environment's BROWSER_PATH. The page "
    "needs none: leave --figures out."
)


def write_figures(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Write every figure in every position of its switches, as SLUG-Y-X.png and .svg; returns the paths.

    Raises:
        ValueError: no browser to draw them with, or one that does not start.
    """
    import kaleido
    import plotly.graph_objects as go
    from kaleido.errors import BrowserFailedError, ChromeNotFoundError

    folder.mkdir(parents=True, exist_ok=True)
    jobs = []
    for name, height, spec in (item for figure in figures for item in positions(figure)):
        for suffix in FORMATS:
            options = {"format": suffix, "width": WIDTH, "height": height, "scale": 2 if suffix == "png" else 1}
            jobs.append({"fig": go.Figure(spec), "path": folder / f"{name}.{suffix}", "opts": options})
    # Without MathJax, which kaleido would fetch from the network.
    options = {"kopts": {"page_generator": kaleido.PageGenerator(mathjax=False)}, "cancel_on_error": True}
    seconds = SECONDS + SECONDS_EACH * len(jobs)
    try:
        if not any(
            _within(seconds, lambda: kaleido.write_fig_from_object_sync(jobs, **options)) for _ in range(ATTEMPTS)
        ):
            raise ValueError(
                f"report(figures={str(folder)!r}): the browser has not drawn {len(jobs)} files, {ATTEMPTS} times in {seconds} "
                "seconds; try again, or leave --figures out."
            )
    except ChromeNotFoundError:
        raise ValueError(NO_BROWSER.format(folder=str(folder))) from None
    except BrowserFailedError as error:
        raise ValueError(f"report(figures={str(folder)!r}): the browser did not start: {error}.") from error
    return [job["path"] for job in jobs]


def _within(seconds: float, call: Callable[[], Any]) -> bool:
    """Whether a call has ended in time: a browser sometimes never answers. What it raises is raised."""
    raised: list[Exception] = []

    def attempt() -> None:
        try:
            call()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    return not thread.is_alive()


def positions(figure: Figure) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Name, height in pixels and plotly figure of every pair of positions of the switches."""
    for y, y_view in figure.y.items():
        for x, x_view in (figure.x or {"": View("", [])}).items():
            parts = [figure.slug, y if len(figure.y) > 1 else "", x]
            name = "-".join(part.replace("_", "-").replace(".", "-") for part in parts if part)
            # A line does not end inside of "a = 0.5".
            whole = figure.titles[f"{y} {x}"].replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
            title = "<br>".join(textwrap.wrap(whole, CHARACTERS))
            lines = title.count("<br>") + 1
            yield name, figure.height + 60 + 22 * lines, _spec(figure, [y_view, x_view], title, lines)


def _spec(figure: Figure, views: Sequence[View], title: str, lines: int) -> dict[str, Any]:
    traces = []
    for index, trace in enumerate(figure.traces):
        merged = dict(trace)
        for view in views:
            merged |= view.traces[index] if index < len(view.traces) else {}
        traces.append(merged)
    layout = deepcopy(dict(figure.layout))
    for view in views:
        _put(layout, view.layout)
    for axis in ("xaxis", "yaxis"):
        layout[axis] = {"gridcolor": "#E4E7EB", "linecolor": "#B0B7BF"} | layout[axis]
    layout |= {
        "title": {"text": title, "x": 0, "xref": "container", "pad": {"l": 12}, "y": 1, "yanchor": "top", "yref": "container",
                  "font": {"size": 16}},
        "margin": {"l": 12, "r": 16, "t": 32 + 22 * lines, "b": 12},
        "font": {"family": "Arial, Helvetica, sans-serif", "size": 13, "color": "#1B1F24"},
        "paper_bgcolor": "#FFFFFF", "plot_bgcolor": "#FFFFFF",
    }  # fmt: skip
    layout["title"]["pad"]["t"] = 14 + 10 * (lines - 1)
    return {"data": traces, "layout": layout}


def _put(layout: dict[str, Any], entries: Mapping[str, Any]) -> None:
    """Entries such as ``"xaxis.title.text"`` reach into the layout, as in plotly's relayout."""
    for path, value in entries.items():
        *keys, last = path.split(".")
        at = layout
        for key in keys:
            at = at.setdefault(key, {})
        at[last] = value
