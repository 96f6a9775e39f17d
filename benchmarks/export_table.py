"""Trained runs in every format, verified and measured: `python benchmarks/export_table.py RUN ... --out docs/results`.

Every file is compared with its run on the test data: weights bit for bit, outputs, error. Files for a runtime are measured
against themselves in float32 there, on one thread. What a format cannot hold is told, not left out.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from recording import listed, spread, table, versions
from recording import write as record

from blaq.cli.exporting import bytes_of
from blaq.export.bench import bench, machine
from blaq.export.runtimes import SUFFIXES
from blaq.export.verify import verify_file
from blaq.train.directory import open_run
from blaq.train.run import evaluate

FORMATS = {
    "packed": ("blaq.export.packed", "model.safetensors", None),
    "compressed-tensors": ("blaq.export.compressed", "model-compressed", None),
    "onnx exact": ("blaq.export.onnx", "exact.onnx", "exact"),
    "onnx fast": ("blaq.export.onnx", "fast.onnx", "fast"),
    "openvino exact": ("blaq.export.openvino", "exact.xml", "exact"),
    "openvino fast": ("blaq.export.openvino", "fast.xml", "fast"),
}
COLUMNS = ("format", ">file, kB", ">equal weights", ">difference", ">test error %", ">batch 1", ">batch 32")


def measure(run: Path, format_: str, folder: Path, rounds: int) -> dict[str, Any]:
    """A run in one format: exported, verified on the test data, and measured where there is a runtime."""
    module, name, preset = FORMATS[format_]
    path = folder / name
    try:
        export = import_module(module).export_run
        export(run, path, "best", *([preset] if preset else []))
    except ValueError as error:
        return {"format": format_, "refused": str(error)}
    found = verify_file(path, run, split="test")
    row = {
        "format": format_, "bytes": bytes_of(path), "weights": found.weights, "difference": found.difference,
        "error": found.error,
    }  # fmt: skip
    if path.suffix in SUFFIXES:
        row["bench"] = asdict(bench(path, rounds=rounds))
    return row


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("runs", nargs="+", type=Path)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    runs = []
    for run in options.runs:
        directory, recipe = open_run(run)
        result = json.loads(directory.result_file.read_text(encoding="utf-8"))
        rows: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as folder:
            for format_ in FORMATS:
                rows.append(measure(run, format_, Path(folder), options.rounds))
                print(run.name, " | ".join(cells(rows[-1])), flush=True)
        runs.append(
            {
                "run": run.name, "recipe": recipe.name, "method": recipe.optim.method, "bits": str(recipe.optim.bits),
                "torch_error": evaluate(run).error, "float_bytes": result["float_bytes"], "formats": rows,
            }
        )  # fmt: skip
    if options.out:
        where = {"versions": versions("torch", "onnxruntime", "openvino", "compressed-tensors", "safetensors")}
        write({**where, "machine": machine(), "rounds": options.rounds, "runs": runs}, options.out)


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    if "refused" in row:
        return [row["format"], "", f"refused: {row['refused']}", *("" for _ in COLUMNS[3:])]
    times = [
        f"{t['milliseconds']:.3f} ms, {spread(t['speedup'], *t['speedup_range']).replace(' (', ' x (')}"
        for t in row.get("bench", {}).get("timings", ())
    ] or ["", ""]
    checked = [f"{row['weights']} of {row['weights']}", f"{row['difference']:.0e}", f"{row['error']:.2f}"]
    return [row["format"], f"{row['bytes'] / 1e3:.1f}", *checked, *times]


def write(report: dict[str, Any], folder: Path) -> None:
    """export.json, and export.md to read."""
    lines = [
        "# Trained networks in every format",
        "",
        "Each file is compared with its run on the test data: quantized weights equal bit for bit, the largest difference of",
        "an output from torch's relative to the largest output, and the test error in the runtime. Files of weights alone run",
        "in torch, from what is read back, by compressed-tensors' own decompressor where they are for it. Times are of a call",
        "on one thread, and how many times faster than the same network in float32 in the same runtime: median of",
        f"{report['rounds']} pairs taken in turn, and their range. Repeat with",
        "`python benchmarks/export_table.py RUN ... --out docs/results`.",
        "",
        f"{listed(report['versions'])}; {report['machine']}.",
    ]
    for run in report["runs"]:
        lines += [
            "",
            f"## {run['recipe']}, {run['method']}, {run['bits']} bits",
            "",
            f"Test error in torch {run['torch_error']:.2f} %; {run['float_bytes'] / 1e3:.1f} kB in float32.",
            "",
            *table(COLUMNS, map(cells, run["formats"])),
        ]
    record(folder, "export", report, lines)


if __name__ == "__main__":
    main()
