"""Zig-zagging on two toys, one gradient a step beside a step forward and back: `python examples/toy.py --out toy.html`.

1. The authors' toy, l(w) = c |w|^(3/2). With the exact curvature D = l'' the step w - g/D lands on -w: a zig-zag without
   end. The trial point is -w too, and its gradient -g; the blend a g + (1 - a) g* = (2a - 1) g makes it w (3 - 4a).
2. A long valley in two dimensions, both weights ternary with one scale: `blaq.LAQ` and `blaq.BLAQ`, without momentum, at a
   learning rate at which the codes flip. The setting is chosen to show the effect; change the numbers and look.

The table needs blaq alone, the picture plotly: an .html to open anywhere, or with kaleido .svg or .png.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import blaq
from blaq.zigzag import Measures, ZigZag

C, START, STEPS_1D, A_1D = 1.0, 1.0, 12, 0.6
GRID, LR, BETAS, A_2D, STEPS_2D = "ternary", 0.2, (0.0, 0.99), 0.7, 60
START_2D, MINIMUM = (1.5, 0.2), (0.6, -0.5)
SUFFIXES = (".html", ".png", ".svg", ".pdf")
ANGLE, STEEPNESS = 0.3, 20.0  # of the valley's axis, radians; curvature across it, 1 along it
COLOURS = {"LAQ": "#0072B2", "BLAQ": "#D55E00"}  # as in the report; Okabe and Ito: told apart by everyone


def newton_path(a: float, steps: int = STEPS_1D) -> list[float]:
    """The way of w on l(w) = c |w|^(3/2): equations 4 to 9 of the paper, with the exact curvature. a = 1 is LAQ's step."""

    def gradient(w: float) -> float:
        return math.copysign(1.5 * C * math.sqrt(abs(w)), w)

    def curvature(w: float) -> float:
        return 0.75 * C / math.sqrt(abs(w)) if w else math.inf

    path = [START]
    for _ in range(steps):
        w = path[-1]
        trial = w - gradient(w) / curvature(w)
        blend = a * gradient(w) + (1 - a) * gradient(trial)
        path.append(w - blend / (a * curvature(w) + (1 - a) * curvature(trial)))
    return path


def hessian() -> torch.Tensor:
    """The valley: curvature 1 along its axis, STEEPNESS across."""
    turn = torch.tensor([[math.cos(ANGLE), -math.sin(ANGLE)], [math.sin(ANGLE), math.cos(ANGLE)]])
    return turn @ torch.diag(torch.tensor([1.0, STEEPNESS])) @ turn.T


@dataclass(frozen=True)
class Walk:
    """What an optimizer did in the valley."""

    latent: list[list[float]]
    held: list[list[float]]
    loss: list[float]
    measures: Measures
    gradient_evaluations: int


def walk(a: float) -> Walk:
    """Down the valley; a = 1 is LAQ."""
    w = torch.nn.Parameter(torch.tensor([START_2D]))
    groups = [{"params": [w], "param_names": ["w"], "grid": GRID, "solver": "exact"}]
    opt = blaq.LAQ(groups, LR, BETAS) if a == 1 else blaq.BLAQ(groups, LR, BETAS, a=a)
    zigzag = ZigZag(opt)
    H, minimum = hessian(), torch.tensor(MINIMUM)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        away = w[0] - minimum
        loss = away @ H @ away / 2
        loss.backward()
        return loss.detach()

    latent, held, loss = [opt.latent(w)[0].tolist()], [w[0].tolist()], []
    for _ in range(STEPS_2D):
        loss.append(opt.step(closure).item())
        latent.append(opt.latent(w)[0].tolist())
        held.append(w[0].tolist())
    return Walk(latent, held, loss, zigzag.read()["total"], opt.gradient_evaluations)


def figure(lines: dict[str, list[float]], walks: dict[str, Walk]) -> Any:
    """Both toys side by side, as a plotly figure."""
    from plotly.graph_objects import Contour, Figure, Scatter
    from plotly.subplots import make_subplots

    titles = (
        f"l(w) = |w|<sup>3/2</sup>: one gradient lands on -w,<br>forward and back (a = {A_1D:g}) arrives",
        f"A valley, ternary weights: latent path of {STEPS_2D} steps,<br>and the quantized points held (squares)",
    )
    fig: Figure = make_subplots(cols=2, subplot_titles=titles, column_widths=[0.42, 0.58], horizontal_spacing=0.1)
    for name, path in lines.items():
        style = {
            "mode": "lines+markers",
            "line": {"color": COLOURS[name], "width": 2},
            "name": name,
            "legendgroup": name,
        }
        fig.add_trace(Scatter(y=path, **style), col=1, row=1)
    ticks = torch.linspace(-1.3, 2.2, 50)
    x, y = torch.meshgrid(ticks, ticks, indexing="xy")
    away = torch.stack([x, y], dim=-1) - torch.tensor(MINIMUM)
    height = torch.einsum("...i,ij,...j->...", away, hessian(), away) / 2
    levels = {"start": 0, "end": 2.0, "size": 0.25, "coloring": "lines"}
    flat = {
        "showscale": False,
        "colorscale": [[0, "#bbbbbb"], [1, "#bbbbbb"]],
        "hoverinfo": "skip",
        "line": {"width": 1},
    }
    fig.add_trace(
        Contour(x=ticks.tolist(), y=ticks.tolist(), z=height.sqrt().tolist(), contours=levels, **flat), col=2, row=1
    )
    for name, way in walks.items():
        colour = {"color": COLOURS[name]}
        hidden = {"name": name, "legendgroup": name, "showlegend": False}
        latent, held = zip(*way.latent, strict=True), zip(*way.held, strict=True)
        path = dict(zip("xy", latent, strict=True)) | {"mode": "lines+markers"}
        points = dict(zip("xy", held, strict=True)) | {"mode": "markers"}
        fig.add_trace(Scatter(**path, line={**colour, "width": 1.5}, marker={"size": 4}, **hidden), col=2, row=1)
        fig.add_trace(Scatter(**points, marker={**colour, "size": 9, "symbol": "square-open"}, **hidden), col=2, row=1)
    star = {"symbol": "star", "size": 12, "color": "black"}
    fig.add_trace(
        Scatter(x=[MINIMUM[0]], y=[MINIMUM[1]], mode="markers", marker=star, name="minimum", showlegend=True),
        col=2,
        row=1,
    )
    fig.update_xaxes(title="step", col=1)
    fig.update_yaxes(title="w", col=1)
    fig.update_xaxes(title="first weight", range=[-0.1, 2.1], col=2)
    fig.update_yaxes(title="second weight", range=[-1.2, 0.5], col=2)
    fig.update_layout(template="plotly_white", width=1000, height=460, margin={"t": 70, "b": 50, "l": 60, "r": 20})
    return fig


def main() -> None:
    """Print the measures, and draw."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, help="toy.html, toy.svg or toy.png")
    out = arguments.parse_args().out
    if out is not None and out.suffix not in SUFFIXES:
        arguments.error(f"--out {out}: expected a name that ends in {', '.join(SUFFIXES)}.")
    lines = {"LAQ": newton_path(1.0), "BLAQ": newton_path(A_1D)}
    walks = {"LAQ": walk(1.0), "BLAQ": walk(A_2D)}
    print(
        f"|w|^(3/2) after {STEPS_1D} steps: " + ", ".join(f"{name} w = {path[-1]:.4f}" for name, path in lines.items())
    )
    print(f"\nvalley, {STEPS_2D} steps   gradients  zig-zag rate  path efficiency  flip rate  mean loss of the last 20")
    for name, way in walks.items():
        m = way.measures
        shares = f"{m.zigzag_rate:>13.2f}  {m.path_efficiency:>15.2f}  {m.flip_rate:>9.2f}"
        print(f"{name:<18} {way.gradient_evaluations:>10} {shares}  {sum(way.loss[-20:]) / 20:>24.3f}")
    if out is not None:
        fig = figure(lines, walks)
        if out.suffix == ".html":
            fig.write_html(out, include_plotlyjs=True)
        else:
            fig.write_image(out)


if __name__ == "__main__":
    main()
