"""The memory that training takes beyond parameters and gradients: `python benchmarks/memory.py --out docs/results`.

A fresh process for each case takes the step on a few weights, so that code is loaded and compiled; then come parameters
and gradients, the optimizer, a first step, three more, and `eval`. Measured in each stage, less what there was before the
parameters, less parameters and gradients by their exact size: the most that was allocated at once (glibc's account of it,
looked at thousands of times a second), and the peak of the resident memory (VmHWM of Linux, set back before each stage), which
includes memory that is free but not handed back. Between the stages it is (malloc_trim). Beside them stands what
`blaq.memory_report` tells before training. A busy machine does not change the numbers.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from recording import listed, processor, versions, write

import blaq

COLUMNS = 4096
MANY = 2**16  # weights of each of many tensors: as large as those that are stepped together can be
LOOK = 2e-4  # seconds between two looks at what is allocated: large memory takes as long to fill
PIECES = 2**24  # bytes for pieces that are looked at together, however large the tensors
LIBC = ctypes.CDLL(None)
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class Case:
    """What takes steps; `trial` is ``adamw`` for torch's fused AdamW."""

    trial: str
    solver: str = "alternating"
    compiled: bool = False
    grid: str = "ternary"
    many: bool = False

    @property
    def name(self) -> str:
        """As on the command line."""
        if self.trial == "adamw":
            return "adamw"
        words = [self.trial, self.grid, self.solver, "compiled" if self.compiled else "plain", "many" * self.many]
        return "-".join(filter(None, words))


CASES = [
    Case("adamw"),
    *(
        Case(trial, solver, compiled)
        for solver in ("alternating", "exact")
        for compiled in (True, False)
        for trial in ("none", "delayed", "past", "fresh")
    ),
    *(Case("none", "exact", compiled, grid) for grid in ("linear4", "ternary2") for compiled in (True, False)),
    *(Case("fresh", "exact", compiled, "linear4") for compiled in (True, False)),
    *(Case(trial, "alternating", compiled, many=True) for compiled in (True, False) for trial in ("none", "fresh")),
]


def resident(line: str) -> int:
    """Bytes that a line of Linux's account of this process tells: VmRSS now, VmHWM at most since it was set back."""
    if not CLEAR.exists():
        raise SystemExit(f"{Path(__file__).name}: needs Linux, whose {CLEAR} sets the peak of the memory back.")
    fields = dict(entry.split(":", 1) for entry in STATUS.read_text().splitlines())
    return int(fields[line].split()[0]) * 1024


class _MallInfo(ctypes.Structure):
    """What glibc tells of its memory, see mallinfo(3)."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names)


def allocated() -> int:
    """Bytes that are allocated now, by anybody in this process."""
    told = LIBC.mallinfo2()
    return int(told.uordblks + told.hblkhd)


def hand_back() -> None:
    """Give freed memory back to the system, so that it does not count as held."""
    gc.collect()
    LIBC.malloc_trim(0)


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """The most that is allocated and resident inside; a thread of its own looks at what is allocated."""
    found = {"allocated": 0, "resident": 0}
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            found["allocated"] = max(found["allocated"], allocated())
            time.sleep(LOOK)

    hand_back()
    CLEAR.write_text("5")
    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found["resident"] = resident("VmHWM")


def parameters(weights: int, many: bool) -> list[torch.nn.Parameter]:
    """One matrix, or many of equal shape."""
    count, size = (weights // MANY, MANY) if many else (1, weights)
    columns = min(COLUMNS, size) if not many else 256
    return [torch.nn.Parameter(torch.empty(size // columns, columns).normal_(0, 0.05)) for _ in range(count)]


def give_gradients(given: Iterable[torch.nn.Parameter]) -> None:
    """New gradients, as `backward` makes them: the old ones are let go first."""
    for p in given:
        p.grad = None
        p.grad = torch.empty_like(p).normal_(0, 0.01)


def optimizer(given: list[torch.nn.Parameter], case: Case) -> Any:
    """What takes the steps."""
    if case.trial == "adamw":
        return torch.optim.AdamW(given, fused=True)
    group = {"params": given, "grid": case.grid, "solver": case.solver}
    return blaq.BLAQ([group], trial=case.trial, compile=case.compiled)


def step(opt: Any, given: list[torch.nn.Parameter], case: Case) -> None:
    """One step; the second pass of a trial makes gradients of its own."""
    give_gradients(given)
    if case.trial != "fresh":
        opt.step()
        return
    opt.forward_step()
    give_gradients(given)
    opt.backtrack_step()


def measure(case: Case, weights: int) -> dict[str, Any]:
    """Bytes beyond parameters and gradients, in every stage, and what `memory_report` told."""
    torch.manual_seed(0)
    for few in (2**12, 2**18):
        small = parameters(few, case.many and few > MANY)
        opt = optimizer(small, case)
        for _ in range(2):  # the first is solved exactly, the second follows
            step(opt, small, case)
        if case.trial == "past":
            opt.eval()
        del small, opt
    hand_back()
    before = {"allocated": allocated(), "resident": resident("VmRSS")}
    given = parameters(weights, case.many)
    give_gradients(given)
    own = 2 * sum(p.nbytes for p in given)
    found: dict[str, dict[str, int]] = {}
    with watched() as found["start"]:
        opt = optimizer(given, case)
    with watched() as found["first"]:
        step(opt, given, case)
    with watched() as found["steps"]:
        for _ in range(3):
            step(opt, given, case)
    hand_back()
    found["state"] = {"allocated": allocated(), "resident": resident("VmRSS")}
    if case.trial == "past":
        with watched() as found["eval"]:
            opt.eval()
    measured = {stage: {kind: peak - before[kind] - own for kind, peak in of.items()} for stage, of in found.items()}
    if case.trial == "adamw":
        told = {"state": own, "held": own, "temporaries": 0}  # two moments, as large as parameter and gradient
    else:
        report = blaq.memory_report(opt)
        told = {"state": report.total.state, "held": report.total.bytes, "temporaries": report.temporaries}
    return {"case": asdict(case), "weights": sum(p.numel() for p in given), "measured": measured, "told": told}


def in_a_process(case: Case, weights: int) -> dict[str, Any]:
    """`measure`, in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps(asdict(case)), "--weights", str(weights)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def limits(row: dict[str, Any]) -> dict[str, float]:
    """What was told for each stage that was measured, in bytes: held in it, and one temporary of the largest tensor."""
    told, trial = row["told"], row["case"]["trial"]
    in_steps = (told["held"] if trial == "fresh" else told["state"]) + told["temporaries"]
    at = {"state": told["state"], "start": told["state"] + told["temporaries"], "first": in_steps, "steps": in_steps}
    return at | {"eval": told["held"] + told["temporaries"]}


def cell(row: dict[str, Any], stage: str) -> str:
    """Bytes a weight: allocated, resident, told. What is allocated above that by more than a tenth, and pieces, is marked."""
    if stage not in row["measured"]:
        return ""
    of, limit = row["measured"][stage], limits(row)[stage] / row["weights"]
    most, kept = (of[kind] / row["weights"] for kind in ("allocated", "resident"))
    room = 0.1 + (PIECES / row["weights"] if stage != "state" else 0.0)
    return f"{most:.1f} ({kept:.1f}) / {limit:.1f}{' over' if most > limit + room else ''}"


STAGES = ("state", "start", "first", "steps", "eval")


def page(report: dict[str, Any]) -> list[str]:
    """The tables to read."""
    lines = [
        "# The memory of training",
        "",
        "Bytes a weight beyond parameters and gradients (4 each), in a fresh process for each case: the most that was",
        "allocated at once in each stage; (the peak of the resident memory, which includes what has been let go and not",
        "handed back to the system;) / what `blaq.memory_report` tells before training, its temporaries (the largest tensor)",
        "included. `state` is what stays after the steps, `start` building the optimizer, `first` the first step, which is",
        'solved exactly, `steps` three more, `eval` what `trial="past"` does to evaluate. AdamW is told 8. "over" marks what',
        f"is allocated above that by more than a tenth of a byte and {PIECES >> 20} MB (pieces of a tensor). Repeat with",
        "`python benchmarks/memory.py --out docs/results`, which takes `--weights` and `--cases`.",
        "",
        f"{listed(report['versions'])}; {report['machine']['cpu']}, {report['machine']['capability']}, one thread.",
    ]
    for weights in dict.fromkeys((row["weights"] // 10**6, row["case"]["many"]) for row in report["rows"]):
        rows = [row for row in report["rows"] if (row["weights"] // 10**6, row["case"]["many"]) == weights]
        tensors = f"tensors of {MANY:,}" if rows[0]["case"]["many"] else "one tensor"
        lines += [
            "",
            f"## {rows[0]['weights']:,} float32 weights, {tensors}",
            "",
            f"| trial | grid | solver | compiled | {' | '.join(STAGES)} |",
            f"|---|---|---|---|{'---:|' * len(STAGES)}",
        ]
        for row in rows:
            case, cells = row["case"], " | ".join(cell(row, stage) for stage in STAGES)
            what = ("AdamW(fused)", "", "", "")
            if case["trial"] != "adamw":
                what = (case["trial"], case["grid"], case["solver"], "yes" if case["compiled"] else "no")
            lines.append(f"| {' | '.join(what)} | {cells} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write memory.json and memory.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, nargs="*", default=[25_165_824], help="100_663_296 for 100 million")
    parser.add_argument("--cases", nargs="*", help=f"some of: {', '.join(case.name for case in CASES)}")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        torch.set_num_threads(1)
        LIBC.mallinfo2.restype = _MallInfo
        sys.setswitchinterval(LOOK)
        print(json.dumps(measure(Case(**json.loads(options.child)), options.weights[0])))
        return
    unknown = set(options.cases or ()) - {case.name for case in CASES}
    if unknown:
        parser.error(f"--cases {' '.join(sorted(unknown))}: expected some of {', '.join(case.name for case in CASES)}.")
    rows = []
    for weights in options.weights:
        for case in CASES:
            if options.cases is None or case.name in options.cases:
                rows.append(in_a_process(case, weights))
                cells = "  ".join(f"{stage} {cell(rows[-1], stage)}" for stage in STAGES if cell(rows[-1], stage))
                print(f"{rows[-1]['weights']:>11,} {case.name:<36} {cells}", flush=True)
    if options.out:
        where = {"versions": versions("python", "torch", "blaq"), "machine": processor()}
        report = {**where, "rows": rows}
        write(options.out, "memory", report, page(report))


if __name__ == "__main__":
    main()
