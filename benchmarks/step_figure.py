"""The picture of the cost of a step: `python benchmarks/step_figure.py`, from docs/results/step.json alone.

Draws docs/figures/step.svg: the ratio to AdamW(fused=True) of every case on one large tensor, the median of the pairs and
their range, with its target, and the limit that the bytes set. Needs plotly, kaleido and a browser, as `blaq report --figures`.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import kaleido
import plotly.graph_objects as go

from blaq.report.figures import CYCLE

ROOT = Path(__file__).parents[1] / "docs"
LIMIT = 36 / 28  # bytes a weight that LAQ and the fused AdamW must move
TICKS = [1, 2, 3, 5, 10, 20, 50, 100, 200, 500]


def label(row: dict[str, Any]) -> str:
    """What a row measures: the grid, and what is not the plainest case."""
    words = [row["grid"]]
    words += {"tensor": [], "channel": ["per channel"]}.get(row["granularity"], [f"groups of {row['granularity']}"])
    words += ["BLAQ fresh, both halves"] if row["trial"] == "fresh" else []
    return f"{', '.join(words)}: {row['solver']}"


def figure(report: dict[str, Any]) -> go.Figure:
    """Cases from top to bottom in the order of the table, ratios from left to right."""
    tables = [table for table in report["tables"] if table["peer"] == "fused"]
    if not tables:
        raise SystemExit(
            "step_figure.py: step.json holds no table over AdamW(fused=True); run benchmarks/step.py first."
        )
    names = [label(row) for table in tables for row in table["rows"]]
    # Those of channels, groups and both halves are over LAQ, and have no place here.
    targets = {label(row): row["target"] for table in tables for row in table["rows"] if "laq" not in row}
    drawn = go.Figure()
    line = {"color": "#1B1F24", "width": 3}
    marks = {"symbol": "line-ns", "size": 15, "line": line}
    drawn.add_scatter(x=list(targets.values()), y=list(targets), mode="markers", marker=marks, name="target, at most")
    for table, colour in zip(tables, CYCLE, strict=False):
        rows, threads = table["rows"], table["threads"]
        ratios = [row["adamw"] for row in rows]
        low, high = ([abs(of["ratio"] - of["range"][end]) for of in ratios] for end in (0, 1))
        drawn.add_scatter(
            x=[of["ratio"] for of in ratios],
            y=[label(row) for row in rows],
            error_x={"type": "data", "array": high, "arrayminus": low, "thickness": 1.5, "width": 0},
            mode="markers",
            marker={"color": colour, "size": 8},
            name=f"{table['weights'] / 1e6:.0f} million weights, {threads} thread{'s' * (threads > 1)}",
        )
    drawn.add_vline(x=LIMIT, line={"color": "#1B1F24", "width": 1, "dash": "dot"})
    # On a logarithmic axis a line takes the number, an annotation its logarithm.
    text = {"text": f"{LIMIT:.1f}: the bytes", "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False}
    drawn.add_annotation(x=math.log10(LIMIT), **text)
    drawn.update_xaxes(
        type="log",
        tickvals=TICKS,
        title={
            "text": "time of a step over that of AdamW(fused=True), median and range of the pairs",
            "font": {"size": 13},
        },
        gridcolor="#E4E7EB",
        linecolor="#B0B7BF",
    )
    drawn.update_yaxes(autorange="reversed", gridcolor="#E4E7EB", linecolor="#B0B7BF")
    drawn.update_layout(
        width=900,
        height=150 + 24 * len(set(names)),
        font={"family": "Arial, Helvetica, sans-serif", "size": 13, "color": "#1B1F24"},
        paper_bgcolor="#FFFFFF",
        plot_bgcolor="#FFFFFF",
        margin={"l": 12, "r": 16, "t": 30, "b": 12},
        legend={"orientation": "h", "x": 0, "y": -0.11, "yanchor": "top"},
    )
    return drawn


def main(arguments: list[str] | None = None) -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "step.json")
    parser.add_argument("--out", type=Path, default=ROOT / "figures" / "step.svg", help="an .svg or .png")
    options = parser.parse_args(arguments)
    drawn = figure(json.loads(options.results.read_text()))
    # Without MathJax, which kaleido would fetch from the network.
    page = kaleido.PageGenerator(mathjax=False)
    kaleido.write_fig_sync(drawn, path=options.out, kopts={"page_generator": page})


if __name__ == "__main__":
    main()
