"""How fast an exported file runs, and what it takes, beside the same model in float32 in the same runtime.

The float32 model is made from the file itself, so it needs no run and no torch model. Both are timed in turn, and a
speed-up is the median of the pairs; memory is measured in a process of its own for each.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blaq.export.files import bytes_of
from blaq.export.float_twin import Input, inputs_of, write_float32
from blaq.export.runtimes import SUFFIXES, Session, open_session

__all__ = ["BATCHES", "Bench", "Timing", "bench", "resident_growth"]

BATCHES = (1, 32)
SEQUENCE = 64  # tokens, where the length is free
SLICE = 0.02  # seconds of calls that one measurement takes at least
PROC = Path("/proc")  # Linux only
PACKAGES = {".onnx": "onnxruntime", ".xml": "openvino"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The speed at one batch size.

    Attributes:
        batch: examples a call.
        milliseconds: of a call, the median.
        milliseconds_float32: of the float32 model.
        speedup: how many times faster than the float32 model: the median of the pairs.
        speedup_range: the slowest and the fastest pair.
        examples_per_second: at the median.
    """

    batch: int
    milliseconds: float
    milliseconds_float32: float
    speedup: float
    speedup_range: tuple[float, float]
    examples_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What `bench` has measured.

    Attributes:
        file: its name.
        runtime: with its version.
        preset: ``"exact"`` or ``"fast"``.
        threads: of the runtime.
        rounds: pairs at every batch size.
        clock: what is timed: ``"CPU time of the process"`` with one thread, else ``"wall time"``.
        bytes: of the file, of OpenVINO's both files.
        bytes_float32: of the float32 model's.
        resident: bytes by which the process grows when the file is loaded and run once; None where the system cannot tell.
        resident_float32: the same for the float32 model.
        timings: one for each batch size.
        machine: processor and load average.
    """

    file: str
    runtime: str
    preset: str
    threads: int
    rounds: int
    clock: str
    bytes: int
    bytes_float32: int
    resident: int | None
    resident_float32: int | None
    timings: tuple[Timing, ...]
    machine: str


def bench(
    path: Path,
    *,
    threads: int = 1,
    rounds: int = 15,
    batches: Sequence[int] = BATCHES,
    sequence: int = SEQUENCE,
    memory: bool = True,
) -> Bench:
    """Measure an exported file against the same model in float32, in the same runtime with the same threads.

    Args:
        path: ``.onnx`` or ``.xml`` (OpenVINO).
        threads: of the runtime, at least 1.
        rounds: pairs of measurements at every batch size, at least 1.
        batches: examples a call, where the file has not fixed their number.
        sequence: tokens, where the length is free.
        memory: measure resident memory too, in two more processes.

    Raises:
        ValueError: a file that no runtime computes from, or see `open_session`; an argument out of range, or one that the
            file does not take.
        ImportError: the runtime is not installed.

    Example:
        >>> bench(Path("model.safetensors"))
        Traceback (most recent call last):
        ValueError: bench('model.safetensors'): the file holds weights alone, no runtime computes from it; write one that a \
runtime does: `blaq export RUN --format onnx` or `--format openvino`.
    """
    path = Path(path)
    _check(path, threads, rounds, batches, sequence)
    session = open_session(path, threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        twin = write_float32(session, path, Path(folder))
        float32 = open_session(twin, threads=threads)
        timings = []
        for batch in batches if session.batch is None else [session.batch]:
            inputs = random_inputs(inputs_of(path), batch, sequence)
            _try(session, path, inputs, batch, sequence)
            timings.append(_time(session, float32, inputs, batch, rounds, threads))
        resident = resident_growth(path, threads, sequence) if memory else None
        resident_float32 = resident_growth(twin, threads, sequence) if memory else None
        size_float32 = bytes_of(twin)
    package = PACKAGES[path.suffix]
    return Bench(
        file=path.name,
        runtime=f"{SUFFIXES[path.suffix]} {version(package)}",
        preset=session.preset,
        threads=threads,
        rounds=rounds,
        clock="CPU time of the process" if threads == 1 else "wall time",
        bytes=bytes_of(path),
        bytes_float32=size_float32,
        resident=resident,
        resident_float32=resident_float32,
        timings=tuple(timings),
        machine=machine(),
    )


def machine() -> str:
    """The processor and how busy the machine is."""
    try:
        lines = (PROC / "cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{name}, {os.cpu_count()} cores{load}"


def random_inputs(takes: Sequence[Input], batch: int, sequence: int = SEQUENCE) -> tuple[NDArray[Any], ...]:
    """Inputs of a batch: normal numbers, and zeros where it takes integers, which every vocabulary has."""
    generator = np.random.default_rng(0)
    arrays: list[NDArray[Any]] = []
    for shape, dtype in takes:
        free = [batch, *[sequence] * len(shape)]
        sizes = [other if size is None else size for size, other in zip(shape, free, strict=False)]
        if np.issubdtype(dtype, np.floating):
            arrays.append(generator.standard_normal(sizes).astype(dtype))
        else:
            arrays.append(np.zeros(sizes, dtype))
    return tuple(arrays)


def interleaved(
    one: Callable[[], Any], other: Callable[[], Any], rounds: int, threads: int
) -> tuple[list[float], list[float]]:
    """Seconds a call of two functions, measured in turn, each over enough calls for the clock."""
    clock = time.process_time if threads == 1 else time.perf_counter

    def seconds(call: Callable[[], Any], calls: int) -> float:
        call()  # the other one has left the caches cold: not counted
        start = clock()
        for _ in range(calls):
            call()
        return (clock() - start) / calls

    calls = []
    for call in (one, other):
        seconds(call, 2)  # buffers and kernels are made at the first call
        calls.append(max(1, round(SLICE / max(seconds(call, 2), 1e-7))))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        # Both orders, for whoever comes second is slower by some percent, also against itself.
        first, then, again, last = (seconds((one, other)[which], calls[which]) for which in (0, 1, 1, 0))
        times[0].append((first + last) / 2)
        times[1].append((then + again) / 2)
    return times


def _try(session: Session, path: Path, inputs: tuple[NDArray[Any], ...], batch: int, sequence: int) -> None:
    try:
        session.run(*inputs)
    except ValueError as error:
        raise ValueError(
            f"bench({str(path)!r}): the file does not take batches={batch} with sequence={sequence}; pass sizes that it takes, "
            f"as a sequence no longer than its positions. {error}"
        ) from error


def _time(
    session: Session, float32: Session, inputs: tuple[NDArray[Any], ...], batch: int, rounds: int, threads: int
) -> Timing:
    ours, theirs = interleaved(lambda: session.run(*inputs), lambda: float32.run(*inputs), rounds, threads)
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    median = statistics.median(ours)
    return Timing(
        batch=batch,
        milliseconds=1e3 * median,
        milliseconds_float32=1e3 * statistics.median(theirs),
        speedup=statistics.median(ratios),
        speedup_range=(min(ratios), max(ratios)),
        examples_per_second=batch / median,
    )


def resident_growth(path: Path, threads: int, sequence: int = SEQUENCE) -> int | None:
    """Bytes of memory that a new process takes more after it has loaded a file and run one example; None where the system
    does not say.
    """
    if not (PROC / "self" / "statm").exists():
        return None
    code = f"from blaq.export.bench import _grow; _grow({str(path)!r}, {threads}, {sequence})"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if child.returncode:
        raise ValueError(f"bench({str(path)!r}): the process that measures memory failed: {child.stderr.strip()}")
    return int(json.loads(child.stdout))


def _grow(path: str, threads: int, sequence: int) -> None:
    """Print by how much this process grows; the runtime's own code is there before."""
    inputs = random_inputs(inputs_of(Path(path)), 1, sequence)
    import_module(PACKAGES[Path(path).suffix])
    before = _resident()
    session = open_session(Path(path), threads=threads)  # alive while it is measured
    session.run(*inputs)
    print(json.dumps(_resident() - before))


def _resident() -> int:
    pages = int((PROC / "self" / "statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _check(path: Path, threads: int, rounds: int, batches: Sequence[int], sequence: int) -> None:
    owner = f"bench({str(path)!r})"
    if path.suffix == ".safetensors" or path.is_dir():
        raise ValueError(
            f"{owner}: the file holds weights alone, no runtime computes from it; write one that a runtime does: "
            "`blaq export RUN --format onnx` or `--format openvino`."
        )
    for name, value in (("threads", threads), ("rounds", rounds), ("sequence", sequence)):
        if value < 1:
            raise ValueError(f"{owner}: {name}={value}, expected at least 1.")
    if not batches or min(batches) < 1:
        raise ValueError(f"{owner}: batches={list(batches)}, expected at least one, each 1 or more.")
