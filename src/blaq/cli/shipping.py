"""``blaq inspect``."""

from pathlib import Path
from typing import Annotated

import typer

from blaq.cli.app import CheckpointName, app, console, say


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="RUN|FILE", help="A run directory, or a packed file.")],
    checkpoint: Annotated[
        CheckpointName | None,
        typer.Option(help="Of a run: the epoch of the lowest validation error (default), or the last."),
    ] = None,
) -> None:
    """Show the layers of a run or of a packed file: scheme, scales, how often each level is taken, size."""
    from blaq.export.runtimes import SUFFIXES
    from blaq.train.inspect import layers, rich_table, totals

    if path.suffix in SUFFIXES:
        raise ValueError(
            f"{str(path)!r} is a file for {SUFFIXES[path.suffix]}, expected a run or a packed file; how such a file holds its "
            "layers, `blaq verify FILE --against RUN` shows."
        )
    if not path.exists():
        raise ValueError(f"{str(path)!r} holds no run and is no packed file: there is nothing.")
    if path.is_dir():
        chosen = checkpoint or CheckpointName.best
        found = layers(path, checkpoint=chosen.value)
        text = f"{path}, {chosen.value} checkpoint: packed {totals(found)}"
    else:
        from blaq.export.inspect import layers_of_file

        if checkpoint is not None:
            raise ValueError(f"--checkpoint {checkpoint.value}: {str(path)!r} is a file, and holds one; leave it out.")
        found = layers_of_file(path)
        text = f"{path}: {totals(found, path.stat().st_size)}"
    console().print(rich_table(found))
    say(text)
