"""``blaq bench``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from blaq.cli.app import app, console, say

if TYPE_CHECKING:
    from blaq.export.bench import Bench


@app.command()
def bench(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `blaq export` wrote: .onnx or .xml.")],
    threads: Annotated[int, typer.Option(min=1, help="Of the runtime.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of measurements at every batch size.")] = 15,
    batches: Annotated[str, typer.Option(help="Examples a call, separated by commas.")] = "1,32",
    sequence: Annotated[int, typer.Option(min=1, help="Tokens, where the length is free.")] = 64,
    out: Annotated[Path | None, typer.Option(help="Write the numbers as JSON.")] = None,
) -> None:
    """Measure an exported file against the same model in float32 in the same runtime: speed, size, memory."""
    from blaq.export.bench import bench as measure
    from blaq.train.files import write_atomically

    try:
        sizes = [int(text) for text in batches.split(",")]
    except ValueError:
        raise ValueError(f"--batches {batches}: expected numbers separated by commas, such as 1,32.") from None
    if out is not None and not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no directory {str(out.parent)!r}.")
    if out is not None and out.exists() and not out.is_file():
        raise ValueError(f"--out {out}: expected the name of a file, new or to be replaced.")
    found = measure(file, threads=threads, rounds=rounds, batches=sizes, sequence=sequence)
    show(found)
    if out is not None:
        write_atomically(out, json.dumps(asdict(found), indent=2) + "\n")
        say(f"Written to {out}")


def show(found: "Bench") -> None:
    """Print the numbers as a table."""
    from blaq.optim.plan import size

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for name in ("packed", "float32", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for timing in found.timings:
        low, high = timing.speedup_range
        times = f"{timing.milliseconds:.3f} ms", f"{timing.milliseconds_float32:.3f} ms"
        table.add_row(f"batch {timing.batch}", *times, f"{timing.speedup:.2f} x as fast ({low:.2f} to {high:.2f})")
        table.add_row("", f"{timing.examples_per_second:,.0f} /s", "", "")
    ratio = found.bytes_float32 / found.bytes
    table.add_row("file", size(found.bytes), size(found.bytes_float32), f"{ratio:.2f} x smaller")
    if found.resident is not None and found.resident_float32 is not None:
        table.add_row("memory", size(max(found.resident, 0)), size(max(found.resident_float32, 0)), "")
    console().print(table)
    say(
        f"{found.file}, preset {found.preset}, in {found.runtime}; {found.threads} thread{'s' * (found.threads > 1)}, "
        f"{found.clock}, median of {found.rounds} pairs (slowest to fastest); {found.machine}"
    )
    say("memory: what a process takes more after it has loaded the file and run one example")
