"""``blaq report``."""

from pathlib import Path
from typing import Annotated

import typer

from blaq.cli.app import app, say


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Run directories, or folders that `blaq compare` or `blaq ablate` wrote."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    figures: Annotated[
        Path | None, typer.Option(help="Folder to write every figure to as PNG and SVG; needs Chrome or Chromium.")
    ] = None,
) -> None:
    """Make one self-contained HTML page of runs: verdict, curves, zig-zag, settings, layers, cost."""
    from blaq.report.page import build, write_page
    from blaq.report.read import read_runs, read_sweeps
    from blaq.report.static import write_figures
    from blaq.train.files import refuse_below_a_file

    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise ValueError(f"report(out={str(out)!r}): expected the name of an HTML file, such as report.html.")
    refuse_below_a_file(out, f"report(out={str(out)!r})")
    if figures is not None and figures.exists() and not figures.is_dir():
        raise ValueError(
            f"report(figures={str(figures)!r}): expected a folder, new or not, and this is a file; name another."
        )
    if figures is not None:
        refuse_below_a_file(figures / "figure.png", f"report(figures={str(figures)!r})", "--figures")
    made = build(read_runs(runs), read_sweeps(runs))
    write_page(made, out)
    for task in made.tasks:
        for panel in task.panels:
            label = f"{panel.label}: " if panel.label else ""
            say(f"{label}{panel.statements[0].head}." if panel.statements else task.summary)
    say(f"Written to {out} ({out.stat().st_size / 1e6:.1f} MB)")
    if figures is not None:
        paths = write_figures(made.figures, figures)
        say(f"Written to {figures}: {len(paths)} files, PNG and SVG")
