"""What packed weights bring in each runtime: `python benchmarks/deploy.py --out docs/results`.

Networks with random codes, exported, compared with torch, and measured against themselves in float32 in the same runtime:
on one thread, in turn, CPU time, median of the pairs. No data and no training; minutes. Numbers are recorded, not gated.
"""

import argparse
import statistics
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from recording import listed, spread, table, versions
from recording import write as record
from torch import Tensor, nn

from blaq.export import onnx as to_ort
from blaq.export import openvino as to_ov
from blaq.export.bench import bench, inputs_of, interleaved, machine, random_inputs, resident_growth
from blaq.export.files import bytes_of
from blaq.export.float_twin import write_float32
from blaq.export.layers import QuantizedWeight
from blaq.export.runtimes import SUFFIXES, open_session
from blaq.export.verify import verify_outputs, verify_weights
from blaq.grids import Grid
from blaq.optim.groups import param_groups
from blaq.tasks.models import build_model

THREADS = 1


class Network(NamedTuple):
    """A network to measure: the batch sizes, for each grid the presets, and what of it stays in float."""

    title: str
    batches: tuple[int, int]
    cases: dict[str, tuple[str, ...]]
    rules: dict[str, None] = {}  # noqa: RUF012  # a named tuple's default


BOTH, EXACT = ("exact", "fast"), ("exact",)
NETWORKS = {
    "mlp": Network(
        "MLP 784-4096-4096-10", (1, 32), {"binary": BOTH, "ternary": BOTH, "linear4": BOTH, "linear8": BOTH}
    ),
    "lenet5": Network("LeNet-5, 28 x 28", (1, 32), {"binary": EXACT, "ternary": EXACT, "linear4": EXACT}),
    "lenet5-conv": Network(
        "LeNet-5, its convolutions alone packed",
        (1, 32),
        {"binary": EXACT, "ternary": EXACT, "linear4": EXACT},
        {"fc*": None},
    ),
    "resnet18": Network("ResNet-18, 64 x 64", (1, 8), {"binary": EXACT, "ternary": EXACT}),
}
SPEEDUPS = {("fast", 0): 10.0, ("fast", 1): 1.5, ("exact", 0): 3.0}  # aimed at for the MLP, by preset and batch size
# Aimed at for convolutions, which are unpacked at load. LeNet-5 with its linear layers packed tells something else.
CONVOLUTIONS, CONVOLUTION = ("lenet5-conv", "resnet18"), 0.95


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A network in evaluation mode, and two examples."""
    torch.manual_seed(0)
    if name == "mlp":
        layers = [nn.Linear(784, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10)]
        return nn.Sequential(*layers).eval(), torch.randn(2, 784)
    if name.startswith("lenet5"):
        return build_model("lenet5").eval(), torch.randn(2, 1, 28, 28)
    return build_model("resnet18", classes=1000).eval(), torch.randn(2, 3, 64, 64)


def quantize(model: nn.Module, grid: str, rules: dict[str, None]) -> list[QuantizedWeight]:
    """Random codes, one scale a channel; the model holds them then."""
    weights = []
    for group in param_groups(model, bits=grid, granularity="channel", rules=rules):
        for name, p in zip(group["param_names"], group["params"], strict=True):
            if group["grid"] is not None:
                parsed = Grid.parse(grid)
                codes = torch.randint(len(parsed.levels), p.shape).to(torch.uint8)
                norm = parsed.levels.square().mean().sqrt() * p[0].numel() ** 0.5
                scale = (torch.rand(len(p), 1) + 0.5) / norm
                weights.append(QuantizedWeight(name, (), parsed, "channel", codes, scale))
                p.data = weights[-1].values
    return weights


def export(model: nn.Module, weights: list[QuantizedWeight], x: Tensor, path: Path, preset: Any) -> float:
    """Write a file and compare it with torch: the relative difference of the outputs."""
    if path.suffix == ".onnx":
        content: Any = to_ort.to_onnx(model, weights, (x,), preset, None)
        writer: Any = to_ort.unverified
    else:
        content, writer = to_ov.to_openvino(model, weights, (x,), preset), to_ov.unverified
    with writer(content, path) as session:
        verify_weights(session, weights)
        return verify_outputs(session, model, weights, [(x,)])


def measure(name: str, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """All grids, presets and runtimes of a network."""
    network, rows = NETWORKS[name], []
    float32_memory: dict[str, int | None] = {}
    for grid, presets in network.cases.items():
        model, x = build(name)
        weights = quantize(model, grid, network.rules)
        for suffix, runtime in SUFFIXES.items():
            for preset in presets:
                path = folder / f"{name}-{grid}-{preset}{suffix}"
                difference = export(model, weights, x, path, preset)
                if suffix not in float32_memory:
                    twin = write_float32(open_session(path), path, folder)
                    float32_memory[suffix] = resident_growth(twin, THREADS)
                found = asdict(bench(path, threads=THREADS, rounds=rounds, batches=network.batches, memory=False))
                found["resident"] = resident_growth(path, THREADS)
                found["resident_float32"] = float32_memory[suffix]
                containers = sorted({e["container"] for e in open_session(path).description["weights"].values()})
                rows.append(
                    {"network": name, "grid": grid, "difference": difference, "containers": containers, **found}
                )
                speeds = ", ".join(f"{t['speedup']:.2f} x at {t['batch']}" for t in found["timings"])
                print(f"{name:<9} {grid:<8} {runtime:<13} {preset:<6} {found['bytes']:>11,} B  {speeds}", flush=True)
    return rows


def eight_bit_activations(name: str, rounds: int, folder: Path) -> dict[str, Any]:
    """ONNX Runtime's own 8-bit convolutions (weights and activations, its own grids): what they would bring in speed."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model, x = build(name)
    path = folder / f"{name}-float.onnx"
    export(model, quantize(model, "ternary", {}), x, path, "exact")
    twin = write_float32(open_session(path), path, folder)
    prepared, quantized = folder / "prepared.onnx", folder / "quantized.onnx"
    quant_pre_process(str(twin), str(prepared), skip_symbolic_shape=True)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(
                [{"input": np.random.default_rng(k).standard_normal(x.shape, np.float32)} for k in range(4)]
            )

        def get_next(self) -> Any:
            return next(self.batches, None)

    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = THREADS, 3
    quantize_static(
        str(prepared), str(quantized), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    sessions = [onnxruntime.InferenceSession(str(p), options, ["CPUExecutionProvider"]) for p in (quantized, twin)]
    speeds = {}
    for batch in NETWORKS[name].batches:
        (inputs,) = random_inputs(inputs_of(twin), batch)
        one, other = (partial(session.run, None, {"input": inputs}) for session in sessions)
        ours, theirs = interleaved(one, other, rounds, THREADS)
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        speeds[batch] = [round(v, 2) for v in (statistics.median(ratios), min(ratios), max(ratios))]
        print(f"{name:<9} 8-bit activations in ONNX Runtime: {speeds[batch][0]:.2f} x at {batch}", flush=True)
    return {"network": name, "bytes": bytes_of(quantized), "speedup": speeds}


def targets(rows: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """What was aimed at, and whether the best runtime reaches it."""
    found = []
    for (preset, position), aim in SPEEDUPS.items():
        for grid in ("binary", "ternary"):
            speeds = {
                row["runtime"]: row["timings"][position]["speedup"]
                for row in rows
                if (row["network"], row["grid"], row["preset"]) == ("mlp", grid, preset)
            }
            if not speeds:  # the MLP was not measured
                continue
            batch = NETWORKS["mlp"].batches[position]
            each = ", ".join(f"{speed:.1f} in {runtime}" for runtime, speed in speeds.items())
            found.append(
                (f"MLP, {grid}, {preset}, batch {batch}: at least {aim} x: {each}", max(speeds.values()) >= aim)
            )
    for row in rows:
        if row["network"] in CONVOLUTIONS:
            slowest = min(timing["speedup"] for timing in row["timings"])
            title = f"{NETWORKS[row['network']].title}, {row['grid']}, {row['runtime']}"
            found.append((f"{title}: at least {CONVOLUTION} x: {slowest:.2f}", slowest >= CONVOLUTION))
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    torch.set_num_threads(THREADS)
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for name in options.networks for row in measure(name, options.rounds, Path(folder))]
        convolutional = [name for name in options.networks if name in ("lenet5", "resnet18")]
        int8 = [eight_bit_activations(name, options.rounds, Path(folder)) for name in convolutional]
    reached = targets(rows)
    for text, ok in reached:
        print("reached " if ok else "MISSED  ", text)
    if options.out:
        where = {"versions": versions("torch", "onnx", "onnxruntime", "openvino"), "machine": [before, machine()]}
        report = {**where, "threads": THREADS, "rounds": options.rounds, "rows": rows, "int8": int8, "targets": reached}
        write(report, options.out)


def write(report: dict[str, Any], folder: Path) -> None:
    """deploy.json, and deploy.md to read."""
    lines = [
        "# Packed weights in their runtimes",
        "",
        "Networks with random codes and a scale a channel, each against itself in float32 in the same runtime: how many times",
        f"faster, median of {report['rounds']} pairs taken in turn and their range; CPU time of the process,",
        f"{report['threads']} thread. Difference: of the outputs from torch's, relative to the largest. Memory: what a process",
        "takes more after it has loaded the file and run one example, beside the same for float32. Repeat with",
        "`python benchmarks/deploy.py --out docs/results`.",
        "",
        f"{listed(report['versions'])}; {report['machine'][0]} at the start, "
        f"{report['machine'][1].rpartition(', ')[2]} at the end.",
    ]
    for name, network in NETWORKS.items():
        rows = [row for row in report["rows"] if row["network"] == name]
        if rows:
            lines += ["", f"## {network.title}", "", *_table(rows, network)]
    if report["int8"]:
        lines += ["", "## What 8-bit activations would give convolutions", "", *_int8(report["int8"])]
    if report["targets"]:
        lines += ["", "## What was aimed at", ""]
        lines += [
            "Of the MLP in one of the runtimes, of networks with convolutions in each, at the slower batch size.",
            "",
        ]
        lines += [f"- {'reached' if ok else '**missed**'}: {text}" for text, ok in report["targets"]]
    record(folder, "deploy", report, lines)


def _table(rows: list[dict[str, Any]], network: Network) -> list[str]:
    sizes = (">file, MB", ">float32", ">memory, MB", ">float32", ">difference")
    columns = ("runtime", "grid", "preset", "held as", *sizes, *(f">batch {batch}" for batch in network.batches))
    found = []
    for row in rows:
        memory = [
            f"{value / 1e6:.0f}" if value is not None else "" for value in (row["resident"], row["resident_float32"])
        ]
        speeds = [spread(t["speedup"], *t["speedup_range"]) for t in row["timings"]]
        found.append([
            row["runtime"].rpartition(" ")[0], row["grid"], row["preset"], ", ".join(row["containers"]),
            f"{row['bytes'] / 1e6:.2f}", f"{row['bytes_float32'] / 1e6:.1f}", *memory, f"{row['difference']:.0e}", *speeds,
        ])  # fmt: skip
    return table(columns, found)


def _int8(found: list[dict[str, Any]]) -> list[str]:
    cells = [
        [NETWORKS[row["network"]].title, f"{row['bytes'] / 1e6:.2f}"]
        + [f"{spread(*speeds)} at {batch}" for batch, speeds in row["speedup"].items()]
        for row in found
    ]
    return [
        "blaq quantizes weights, and its convolutions compute in float32: packing makes their files small, not their",
        "arithmetic fast. Beside that, ONNX Runtime's own static quantization of the same network: activations and weights of",
        "8 bits on grids of its own, so not the trained weights; speed alone was looked at.",
        "",
        *table(["network", ">file, MB", ">smaller batch", ">larger batch"], cells),
    ]


if __name__ == "__main__":
    main()
