"""``blaq export`` and ``blaq verify``."""

from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from blaq.cli.app import CheckpointName, CheckpointOption, RunArgument, SplitName, app, console, say
from blaq.export.files import bytes_of

if TYPE_CHECKING:
    from blaq.export.verify import Verification


class FormatName(StrEnum):
    """What a run can be written as."""

    packed = "packed"
    compressed_tensors = "compressed-tensors"
    onnx = "onnx"
    openvino = "openvino"


class PresetName(StrEnum):
    """The arithmetic of an exported file."""

    exact = "exact"
    fast = "fast"


MODULES = {
    FormatName.packed: "blaq.export.packed",
    FormatName.compressed_tensors: "blaq.export.compressed",
    FormatName.onnx: "blaq.export.onnx",
    FormatName.openvino: "blaq.export.openvino",
}
# What is written into the run directory by default. The last two are for runtimes, and so have a preset.
NAMES = {
    FormatName.packed: "model.safetensors",
    FormatName.compressed_tensors: "model-compressed-tensors",
    FormatName.onnx: "model-{preset}.onnx",
    FormatName.openvino: "model-{preset}.xml",
}


@app.command()
def export(
    run: RunArgument,
    format_: Annotated[FormatName, typer.Option("--format", help="What to write.")],
    preset: Annotated[
        PresetName | None,
        typer.Option(
            help="Of onnx and openvino: exact is float32 arithmetic (default), fast rounds the activations of linear "
            "layers to 8 bits."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The file; by default RUN/model.. of the format.")] = None,
    checkpoint: CheckpointOption = CheckpointName.best,
) -> None:
    """Write a trained network as a file to ship, and prove that it computes the same."""
    from blaq.train.directory import open_run

    if format_ is FormatName.packed and out is not None and out.suffix != ".safetensors":
        raise ValueError(
            f"--out {out}: expected a name that ends in .safetensors, by which `blaq verify` knows a packed file."
        )
    open_run(run)  # else the file that is to go into it would be refused first, for want of a folder
    module: Any = import_module(MODULES[format_])
    for_runtime = "{preset}" in NAMES[format_]
    if preset is not None and not for_runtime:
        raise ValueError(f"export(preset='{preset}'): --format {format_} holds weights alone; drop --preset.")
    chosen = (preset or PresetName.exact).value
    path = out or run / NAMES[format_].format(preset=chosen)
    if for_runtime:
        module.export_run(run, path, checkpoint.value, chosen, report=show)
    else:
        module.export_run(run, path, checkpoint.value)
    say(f"Written to {path}: {bytes_of(path):,} bytes, read back and compared with the run")


@app.command()
def verify(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="What `blaq export` wrote: .onnx, .xml, .safetensors, or the folder for compressed-tensors.",
        ),
    ],
    against: Annotated[Path, typer.Option(metavar="RUN", help="The run it was made from.")],
    split: Annotated[SplitName, typer.Option(help="The data to compare outputs on.")] = SplitName.validation,
    checkpoint: CheckpointOption = CheckpointName.best,
) -> None:
    """Prove that an exported file computes what its run computes: weights, outputs, accuracy."""
    from blaq.export.verify import verify_file

    show(verify_file(file, against, split=split.value, checkpoint=checkpoint.value))
    say(f"{file}: verified against {against}, {checkpoint.value} checkpoint, {split.value} data")


def show(verification: "Verification") -> None:
    """Print how the layers are held, and what the verification has found."""
    weights: dict[str, dict[str, Any]] = verification.description["weights"]
    if any("container" in entry for entry in weights.values()):
        console().print(rich_table(weights))
    say(f"Weights: {verification.weights} of {verification.weights} quantized weights equal bit for bit")
    say(
        f"Outputs ({verification.description['preset']}): relative difference {verification.difference:.1e} at most, "
        f"{verification.examples:,} predictions"
    )
    say(f"Error: {verification.error:.2f} %, in torch {verification.torch_error:.2f} %")


def rich_table(weights: dict[str, dict[str, Any]]) -> Table:
    """The quantized weights of a file: how each is held, in how many bits, and why where it is unpacked."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("layer", "shape", "scheme", "held as"):
        table.add_column(name, overflow="fold")
    table.add_column("bits", justify="right", no_wrap=True)
    for name, entry in weights.items():
        shared = entry["granularity"] if isinstance(entry["granularity"], str) else f"group of {entry['granularity']}"
        held = f"float32 at load: {entry['note']}" if entry.get("note") else entry["container"]
        bits = f"{entry['bits']:.2f}" if "bits" in entry else ""
        table.add_row(name, " x ".join(map(str, entry["shape"])), f"{entry['grid']} per {shared}", held, bits)
    return table
