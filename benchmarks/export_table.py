"""Trained runs in every format, verified and measured: `python benchmarks/export_table.py RUN ... --out docs/results`.

Every file is compared with its run on the test data: weights bit for bit, outputs, error. Files for a runtime are measured
against themselves in float32 there, on one thread. What a format cannot hold is told, not left out.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

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


def size(path: Path) -> int:
    """Bytes of a file, of all of a folder, of an .xml and its .bin."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size + (path.with_suffix(".bin").stat().st_size if path.suffix == ".xml" else 0)


def measure(run: Path, format_: str, folder: Path, rounds: int) -> dict[str, Any]:
    """A run in one format: exported, verified on the test data, and measured where there is a runtime."""
    module, name, preset = FORMATS[format_]
    path = folder / name
    try:
        export = import_module(module).export_run
        export(run, path, "best", *([preset] if preset else []))
    except ValueError as error:
        return {"format": format_, "refused": str(error)}
    row: dict[str, Any] = {"format": format_, "bytes": size(path)}
    if path.suffix == ".safetensors" or path.suffix in SUFFIXES:
        found = verify_file(path, run, split="test")
        row |= {"weights": found.weights, "difference": found.difference, "error": found.error}
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
                print(run.name, text(rows[-1]), flush=True)
        runs.append(
            {
                "run": run.name, "recipe": recipe.name, "method": recipe.optim.method, "bits": str(recipe.optim.bits),
                "torch_error": evaluate(run).error, "float_bytes": result["float_bytes"], "formats": rows,
            }
        )  # fmt: skip
    if options.out:
        packages = ("torch", "onnxruntime", "openvino", "safetensors")
        versions = {package: version(package) for package in packages}
        write({"versions": versions, "machine": machine(), "rounds": options.rounds, "runs": runs}, options.out)


def text(row: dict[str, Any]) -> str:
    """A row of the table, without its frame."""
    if "refused" in row:
        return f"{row['format']} | - | refused: {row['refused']} | | | | |"
    times = [
        f"{t['milliseconds']:.3f} ms, {t['speedup']:.2f} x ({t['speedup_range'][0]:.2f} to {t['speedup_range'][1]:.2f})"
        for t in row.get("bench", {}).get("timings", ())
    ] or ["", ""]
    checked = (
        f"{row['weights']} of {row['weights']} | {row['difference']:.0e} | {row['error']:.2f}"
        if "weights" in row
        else "| |"
    )
    return f"{row['format']} | {row['bytes'] / 1e3:.1f} | {checked} | {' | '.join(times)}"


def write(report: dict[str, Any], folder: Path) -> None:
    """export.json, and export.md to read."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "export.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# Trained networks in every format",
        "",
        "Each file is compared with its run on the test data: quantized weights equal bit for bit, the largest difference of",
        "an output from torch's relative to the largest output, and the test error in the runtime. Times are of a call on one",
        f"thread, and how many times faster than the same network in float32 in the same runtime: median of {report['rounds']}",
        "pairs taken in turn, and their range. Repeat with `python benchmarks/export_table.py RUN ... --out docs/results`.",
        "",
        ", ".join(f"{name} {number}" for name, number in report["versions"].items()) + f"; {report['machine']}.",
    ]
    for run in report["runs"]:
        lines += [
            "",
            f"## {run['recipe']}, {run['method']}, {run['bits']} bits",
            "",
            f"Test error in torch {run['torch_error']:.2f} %; {run['float_bytes'] / 1e3:.1f} kB in float32.",
            "",
            "| format | file, kB | equal weights | difference | test error % | batch 1 | batch 32 |",
            "|---|---:|---:|---:|---:|---:|---:|",
            *(f"| {text(row)} |" for row in run["formats"]),
        ]
    (folder / "export.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
