"""Read many broken and hostile packed files: `python benchmarks/fuzz_packed.py --count 100000 --out docs/results`.

Real files are mutated, their bytes and their structure; most structural mutations are sealed with the right lengths and the
right checksum, so that they reach the code behind those. Whatever comes, `load_packed` must return a model of the file's
size or raise a ValueError that names the file, within seconds and without large allocations. A failure is printed with
its seed, and ``--first SEED --count 1`` repeats it.
"""

import argparse
import copy
import hashlib
import json
import random
import resource
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recording import versions, write
from torch import nn

import blaq
from blaq.export.packed import load_packed, read_packed
from blaq.tasks.models import build_model

SECONDS = 10  # for one file
HEADROOM = 2**31  # bytes of address space that reading may take beyond what the process has
GROWTH = 64  # a 1-bit code becomes a byte and then a float32 value, with room for its description
INTERESTING: list[Any] = [
    None, True, False, -1, 0, 1, 2, 7, 8, 255, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, 10**400, -(2**63),
    0.5, -0.0, 1e308, "", "x", "..", "weight", "tensor", "channel", "binary", "trits", "bits8", "F32", "U8", "I64", "BOOL",
    "packed", "é\u2028", "\ud800", "A" * 5000, [], [0], [1], [-1], [2**62, 2**62], [0, 2**63], [1] * 70, [[1]], {}, {"a": 1},
    "hf:gpt2", "mlp", "lenet5", "char_lstm",
]  # fmt: skip


def models() -> dict[str, tuple[nn.Module, Callable[[], nn.Module]]]:
    """Name to a trained model's stand-in and its optimizer's groups, and how to build the plain model."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.lstm = nn.LSTM(8, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embedding.weight
            self.register_buffer("flags", torch.tensor([True, False]))

    def perceptron() -> nn.Module:
        return build_model("mlp", inputs=16, hidden=[12, 8], classes=4)

    def convolutions() -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 2), nn.Conv1d(2, 3, 3))

    return {"recipe": (perceptron(), perceptron), "tied": (Tied(), Tied), "conv": (convolutions(), convolutions)}


def seeds(folder: Path) -> list[tuple[bytes, Callable[[], nn.Module]]]:
    """Real files, and the models they belong to: every grid, every granularity, ties, a recipe."""
    schemes = [
        ("binary", "tensor"),
        ("ternary", "channel"),
        ("ternary2", "channel"),
        ("linear3", 4),
        ("linear8", "tensor"),
    ]
    schemes += [
        ("log4", "channel"),
        ("midrise2", 4),
        ("midrise5", "tensor"),
        ("linear6", "channel"),
        ("linear7", "tensor"),
    ]
    found = []
    for name, (model, build) in models().items():
        for index, (grid, granularity) in enumerate(schemes):
            rules = {"embedding": grid} if name == "tied" else None
            if name == "conv" and isinstance(granularity, int):
                continue
            opt = blaq.LAQ(blaq.param_groups(model, grid, granularity, rules=rules))
            path = folder / f"seed-{name}-{index}"
            blaq.save_packed(model, opt, path)
            data = path.read_bytes()
            if name == "recipe":
                header, tensors = split(data)
                recipe = {"model": {"name": "mlp", "options": {"inputs": 16, "hidden": [12, 8], "classes": 4}}}
                header["__metadata__"]["blaq"]["recipe"] = recipe
                data = join(header, tensors)
            path.write_bytes(data)
            load_packed(path, None if name == "recipe" else build())
            found.append((data, build))
    return found


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header, its description parsed, and the bytes of the tensors."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["blaq"] = json.loads(header["__metadata__"]["blaq"])
    return header, data[8 + length :]


def join(header: dict[str, Any], tensors: bytes, twice: str = "") -> bytes:
    """Undo `split`, with the length and the checksum that belong to it; the key `twice` comes twice."""
    header = json.loads(json.dumps(header))
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and isinstance(metadata.get("blaq"), dict):
        description = metadata["blaq"]
        if "sha256" in description:
            description.pop("sha256")
            description["sha256"] = "0" * 64
        metadata["blaq"] = repeated(json.dumps(description, separators=(",", ":")), twice)
    text = repeated(json.dumps(header, separators=(",", ":")), twice)
    encoded = text.encode("utf-8", "surrogatepass")
    data = len(encoded).to_bytes(8, "little") + encoded + tensors
    key = rb"\"sha256\":\""
    found = data.rfind(key + b"0" * 64)
    if found < 0:
        return data  # a mutation took the checksum away
    start = found + len(key)
    return data[:start] + hashlib.sha256(data).hexdigest().encode() + data[start + 64 :]


def repeated(text: str, key: str) -> str:
    return text.replace(f'"{key}":', f'"{key}":1,"{key}":', 1) if key else text


# --- mutations ----------------------------------------------------------------------------------------------------------


def mutate_bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Damage as disks, networks and careless programs do it."""
    raw = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 20])):
        # Half of it in the header, which is the smaller part of a large file.
        end = min(len(raw), 8 + int.from_bytes(data[:8], "little")) if rng.random() < 0.5 else len(raw)
        at = rng.randrange(max(end, 1))
        kind = rng.randrange(9)
        if kind == 0:
            del raw[at:]
        elif kind == 1:
            raw += rng.randbytes(rng.choice([1, 8, 100]))
        elif kind == 2 and raw:
            raw[at % len(raw)] ^= 1 << rng.randrange(8)
        elif kind == 3:
            raw[at : at + 4] = rng.randbytes(4)
        elif kind == 4:
            del raw[at : at + rng.randrange(1, 64)]
        elif kind == 5:
            raw[at:at] = rng.randbytes(rng.randrange(1, 64))
        elif kind == 6:
            raw[at:] = other[at:]
        elif kind == 7:
            raw[:8] = rng.choice([0, 1, 7, len(raw), max(len(raw) - 8, 0), 2**31, 2**63, 2**64 - 1]).to_bytes(
                8, "little"
            )
        else:
            raw[at : at + 32] = bytes(min(32, max(len(raw) - at, 0)))
    return bytes(raw)


def mutate_structure(rng: random.Random, data: bytes) -> bytes:
    """Change what the header says, then seal it."""
    header, tensors = split(data)
    twice = ""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        holder, key = place(rng, header["__metadata__"]["blaq"] if rng.random() < 0.7 else header)
        if holder is None:
            continue
        kind = rng.randrange(7)
        if kind <= 2:
            holder[key] = copy.deepcopy(rng.choice(INTERESTING))
        elif kind == 3:
            del holder[key]
        elif kind == 4 and isinstance(holder, dict):
            holder[str(rng.choice(INTERESTING))[:300]] = holder[key]
        elif kind == 5 and isinstance(key, str):
            twice = key
        elif isinstance(holder[key], int):
            holder[key] += rng.choice([-8, -1, 1, 8, 2**32])
        else:
            other, elsewhere = place(rng, header)
            if other is not None:
                holder[key] = json.loads(json.dumps(other[elsewhere]))
        if not isinstance(header.get("__metadata__"), dict) or not isinstance(header["__metadata__"].get("blaq"), dict):
            break
    return join(header, tensors, twice)


def place(rng: random.Random, tree: Any) -> tuple[Any, Any]:
    """A random place in a tree, as the object or list that holds it and the key."""
    found: tuple[Any, Any] = (None, None)
    while isinstance(tree, dict | list) and tree:
        key = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        found, tree = (tree, key), tree[key]
        if rng.random() < 0.25:
            break
    return found


def mutate_data(rng: random.Random, data: bytes) -> bytes:
    """Change codes, scales, shapes and tensors, then seal it."""
    header, tensors = split(data)
    raw = bytearray(tensors)
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.choice([1, 2, 8])):
        start, end = header[rng.choice(names)]["data_offsets"]
        if end == start:
            continue
        at = rng.randrange(start, end)
        value = rng.choice([b"\xff", b"\x00", rng.randbytes(1), b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\xf3"])
        raw[at : at + len(value)] = value[: len(raw) - at]
    return join(header, bytes(raw))


def mutated(seed: int, originals: list[bytes]) -> tuple[bytes, int, str]:
    """The mutated file of a seed, which original it was, and the kind of mutation."""
    rng = random.Random(seed)
    index = rng.randrange(len(originals))
    kind = rng.choices(["bytes", "structure", "data"], [3, 5, 2])[0]
    if kind == "bytes":
        return mutate_bytes(rng, originals[index], rng.choice(originals)), index, kind
    mutate = mutate_structure if kind == "structure" else mutate_data
    return mutate(rng, originals[index]), index, kind


# --- what must hold -------------------------------------------------------------------------------------------------------


def read(path: Path, build: Callable[[], nn.Module]) -> str:
    """ "read", or the reason of refusal. Anything else that happens is a failure, and is raised."""
    try:
        file = read_packed(path)
        size = sum(tensor.numel() * tensor.element_size() for tensor in file.state_dict().values())
        assert size <= GROWTH * path.stat().st_size, f"{size} bytes from a file of {path.stat().st_size}"
        load_packed(path, build())
        if file.recipe is not None:
            load_packed(path)
    except ValueError as error:
        text = str(error)
        assert str(path) in text, f"no file named: {text}"
        assert len(text) < 2000, f"message of {len(text)} characters"
        return text.split(":", 1)[1].strip()
    return "read"


def category(reason: str) -> str:
    """The reason without names and numbers."""
    words = [word for word in reason.split() if not set(word) & set("'\"[]{}()0123456789=")]
    return " ".join(words[:7]).rstrip(".,:;")


def fuzz(first: int, count: int, folder: Path) -> dict[str, Any]:
    """Read the files of `count` seeds; the outcomes, and what failed. In the main thread: a clock stops what hangs."""
    handler = signal.signal(signal.SIGALRM, timed_out)
    torch.manual_seed(0)
    found = seeds(folder)
    originals = [data for data, _ in found]
    outcomes: Counter[str] = Counter()
    kinds: dict[str, Counter[str]] = {kind: Counter() for kind in ("bytes", "structure", "data")}
    failures: list[str] = []
    slowest, path = 0.0, folder / "mutated"
    for seed in range(first, first + count):
        data, index, kind = mutated(seed, originals)
        path.write_bytes(data)
        signal.alarm(SECONDS)
        start = time.perf_counter()
        try:
            reason = read(path, found[index][1])
            outcomes[category(reason)] += 1
            unchanged = data == originals[index]
            kinds[kind]["unchanged" if unchanged else "read" if reason == "read" else "refused"] += 1
            # Damage without a new checksum must be seen.
            assert kind != "bytes" or reason != "read" or data in originals, "damage was not noticed"
        except Exception as error:
            failures.append(f"seed {seed}, {kind}: {type(error).__name__}: {str(error)[:300]}")
            print(failures[-1], flush=True)
        finally:
            signal.alarm(0)
        slowest = max(slowest, time.perf_counter() - start)
    signal.signal(signal.SIGALRM, handler)
    return {
        "files": count,
        "first": first,
        "originals": len(originals),
        "failures": failures,
        "kinds": {kind: dict(counter) for kind, counter in kinds.items()},
        "reasons": dict(outcomes.most_common()),
        "slowest_seconds": round(slowest, 3),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def limit_memory() -> None:
    """Let a huge allocation fail, on Linux, instead of succeeding unnoticed."""
    status = Path("/proc/self/statm")
    if status.exists():
        present = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (present + HEADROOM, resource.RLIM_INFINITY))


def timed_out(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--count", type=int, default=100_000)
    arguments.add_argument("--first", type=int, default=0)
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        limit_memory()
        report = fuzz(options.first, options.count, Path(folder))
    print(json.dumps(report, indent=1))
    if options.out:
        write(options.out, "fuzz-packed", {"versions": versions("python", "torch", "blaq"), **report})
    if report["failures"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
