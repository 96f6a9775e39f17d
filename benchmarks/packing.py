"""How fast codes are packed, and how large a packed file is: `python benchmarks/packing.py --out docs/results`.

Every width packs the same number of codes, one thread, CPU time of the process, the fastest of some rounds and their median;
nothing here is a test. With ``--out``, packing.md also tells what fuzz-packed.json there records.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recording import listed, processor, table, versions, write

from blaq.export.layers import QuantizedWeight
from blaq.export.packed import _write, load_packed
from blaq.export.packing import CONTAINERS, pack, unpack
from blaq.grids import Grid
from blaq.tasks.models import build_model

SIZES = ["binary", "ternary", "ternary2", "midrise2", "linear3", "linear4", "linear5", "linear6", "linear7", "linear8"]


def seconds(call: Callable[[], Any], rounds: int) -> list[float]:
    """CPU times of some calls, after one to warm up."""
    call()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return times


def throughput(container: str, weights: int, rounds: int) -> dict[str, Any]:
    """Billions of weights a second, to bytes and back."""
    limit = 3 if container == "trits" else 2 ** int(container.removeprefix("bits"))
    codes = torch.randint(limit, (weights,), dtype=torch.uint8)
    packed = pack(codes, container)
    row: dict[str, Any] = {"container": container, "bits_per_weight": 8 * len(packed) / weights}
    calls = {"pack": lambda: pack(codes, container), "unpack": lambda: unpack(packed, container, weights)}
    for name, call in calls.items():
        times = seconds(call, rounds)
        row[name] = round(weights / min(times) / 1e9, 2)
        row[f"{name}_median"] = round(weights / statistics.median(times) / 1e9, 2)
    print(row, flush=True)
    return row


def sizes() -> list[dict[str, Any]]:
    """ResNet-18, every matrix and filter quantized per channel: the file against the bits it has to hold."""
    model, rows = build_model("resnet18"), []
    in_float = sum(p.numel() * p.element_size() for p in model.parameters())
    for name in SIZES:
        grid, weights, theory = Grid.parse(name), [], 0.0
        bits = 1.6 if len(grid.levels) == 3 else grid.bits
        for key, tensor in model.state_dict().items():
            if tensor.ndim > 1:
                codes = torch.randint(len(grid.levels), tensor.shape, dtype=torch.uint8)
                scale = torch.rand(len(tensor), grid.scales)
                weights.append(QuantizedWeight(key, (), grid, "channel", codes, scale))
                theory += tensor.numel() * bits / 8 + 4 * scale.numel()
            else:
                theory += tensor.numel() * tensor.element_size()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "resnet18.safetensors")
            start = time.perf_counter()
            _write(path, model, weights, None)
            saved = time.perf_counter()
            load_packed(path, build_model("resnet18"))
            row = {
                "grid": name,
                "file_bytes": path.stat().st_size,
                "theory_bytes": round(theory),
                "over_theory_percent": round(100 * (path.stat().st_size / theory - 1), 2),
                "times_smaller": round(in_float / path.stat().st_size, 1),
                "save_and_verify_seconds": round(saved - start, 2),
                "load_seconds": round(time.perf_counter() - saved, 2),
            }
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--weights", type=int, default=2**24)
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    report = {
        "versions": versions("python", "torch", "blaq"),
        "machine": processor(),
        "weights": options.weights,
        "rounds": options.rounds,
        "gweights_per_second": [throughput(name, options.weights, options.rounds) for name in CONTAINERS],
        "resnet18": sizes(),
    }
    if options.out:
        fuzz = options.out / "fuzz-packed.json"
        text = lines(report, json.loads(fuzz.read_text(encoding="utf-8")) if fuzz.exists() else None)
        write(options.out, "packing", report, text)


def lines(report: dict[str, Any], fuzz: dict[str, Any] | None) -> list[str]:
    """packing.md."""
    speeds = [
        [row["container"], f"{row['bits_per_weight']:.2f}"]
        + [f"{row[key]:.2f}" for key in ("pack", "pack_median", "unpack", "unpack_median")]
        for row in report["gweights_per_second"]
    ]
    found = [
        [
            row["grid"], f"{row['file_bytes']:,}", f"{row['theory_bytes']:,}", f"{row['over_theory_percent']:.2f} %",
            f"{row['times_smaller']:.1f}", f"{row['save_and_verify_seconds']:.2f}", f"{row['load_seconds']:.2f}",
        ]
        for row in report["resnet18"]
    ]  # fmt: skip
    text = [
        "# Packing and the packed file",
        "",
        f"`python benchmarks/packing.py --out docs/results`; {listed(report['versions'])}; {report['machine']['cpu']},",
        f"{report['machine']['capability']}, one thread of a shared machine. The format: [packed-file.md](../packed-file.md).",
        "",
        "## Speed",
        "",
        f"Billions of weights a second, {report['weights']:,} codes of one byte each to packed bytes and back: the fastest of",
        f"{report['rounds']} rounds in CPU time, and their median.",
        "",
        *table(["container", ">bits a weight", ">pack", ">median", ">unpack", ">median"], speeds),
        "",
        "## Size",
        "",
        "ResNet-18 with every matrix and filter quantized per channel, random codes; biases, BatchNorm and its statistics in",
        "float32. Theory: the codes' bits, 4 bytes a scale, 4 a float. What the file has beyond it is names and shapes. Saving",
        "includes reading the file back and comparing it, loading the building of the network.",
        "",
        *table(
            ["grid", ">file, bytes", ">theory", ">over theory", ">float32 over file", ">save, s", ">load, s"], found
        ),
    ]
    return text + (fuzz_lines(fuzz) if fuzz else [])


def fuzz_lines(fuzz: dict[str, Any]) -> list[str]:
    rows = [
        [kind, *(f"{found.get(outcome, 0):,}" for outcome in ("refused", "read", "unchanged"))]
        for kind, found in fuzz["kinds"].items()
    ]
    return [
        "",
        "## Broken and hostile files",
        "",
        f"`python benchmarks/fuzz_packed.py --count {fuzz['files']} --out docs/results`: {fuzz['files']:,} files, mutated from",
        f"{fuzz['originals']} real ones (every kind of grid and granularity, ties, a recipe) by their bytes, by the",
        "structure of their header and description, and by their tensors; the last two sealed with the right lengths and",
        "checksum. Each must load, into a model of the file's size, or be refused with one ValueError that names it, within",
        "seconds.",
        "",
        f"**{len(fuzz['failures'])} failures.** The slowest file took {fuzz['slowest_seconds']} s; the process, with torch and",
        f"everything else in it, took at most {fuzz['peak_memory_mb']} MB.",
        "",
        *table(["mutated", ">refused", ">read", ">left as it was"], rows),
        "",
        "What is read is a mutation that leaves a valid file: other codes or scales under a new checksum. Of unsealed damage",
        f"none went unnoticed. The reasons given fall into {len(fuzz['reasons'])} kinds; all, and how often each, are in",
        "[fuzz-packed.json](fuzz-packed.json). A small form of it, and a table of single faults, run with the tests.",
    ]


if __name__ == "__main__":
    main()
