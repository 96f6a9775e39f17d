"""Names of the hub, end to end: `datasets` itself downloads, from a server here that speaks as much as it asks for."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

from blaq.tasks.data import Dataset, load_dataset

# The layouts of the recipes' names: folder and, but for "data", configuration; image column; its shape; rows a file.
LAYOUTS = {
    "ylecun/mnist": ("mnist", "image", (28, 28), {"train": [60], "test": [20]}),
    "uoft-cs/cifar10": ("plain_text", "img", (32, 32, 3), {"train": [30], "test": [10]}),
    "ufldl-stanford/svhn": ("cropped_digits", "image", (32, 32, 3), {"train": [30], "test": [10], "extra": [9, 8]}),
    "ILSVRC/imagenet-1k": ("data", "image", (40, 30, 3), {"train": [9, 8], "validation": [7], "test": [6]}),
}
COMMIT = "c0" * 20
UNREAD = {"size": 0, "oid": COMMIT}  # what a listing of files has to say besides


def publish(root: Path, folder: str, image: str, shape: tuple[int, ...], rows: dict[str, list[int]]) -> None:
    import datasets

    random, names = np.random.default_rng(0), [f"{folder} {k}" for k in range(10)]
    features = datasets.Features({image: datasets.Image(), "label": datasets.ClassLabel(names=names)})
    for split, sizes in rows.items():
        for k, size in enumerate(sizes):
            pictures = list(random.integers(0, 256, (size, *shape), dtype=np.uint8))
            secret = split == "test" and "validation" in rows  # as ImageNet's are
            labels = [-1] * size if secret else random.integers(0, 10, size)
            path = root / folder / f"{split}-{k:05}-of-{len(sizes):05}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_dict({image: pictures, "label": labels}, features).to_parquet(path)
    config = {"config_name": "default" if folder == "data" else folder}
    classes = {"class_label": {"names": dict(zip("0123456789", names, strict=True))}}
    columns = [{"name": image, "dtype": "image"}, {"name": "label", "dtype": classes}]
    splits = [{"name": split, "num_bytes": 0, "num_examples": sum(sizes)} for split, sizes in rows.items()]
    files = [{"split": split, "path": f"{folder}/{split}-*"} for split in rows]
    # SVHN: two data sets under one name, none of them the default.
    others = [{"config_name": "full_numbers", "data_files": "full_numbers/*"}] if folder == "cropped_digits" else []
    infos = [{**config, "features": columns, "splits": splits}, *others]
    card = json.dumps({"dataset_info": infos, "configs": [{**config, "data_files": files}, *others]})
    (root / "README.md").write_text(f"---\n{card}\n---\n")  # any JSON is YAML


class Hub(ThreadingHTTPServer):
    """The folders owner/name below `root`, as the hub serves data sets."""

    gated = ""  # the name that wants a login
    breaking = ""  # the name whose files break off in the middle


class Visit(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        match self.path.partition("?")[0].strip("/").split("/"):
            case ["datasets", owner, name, "resolve", _, *path]:
                self.resolve(f"{owner}/{name}", "/".join(path))
            case ["storage", owner, name, *path]:
                data = self.server.root.joinpath(owner, name, *path).read_bytes()
                self.answer(200, data, stop=len(data) // 2 if f"{owner}/{name}" == self.server.breaking else None)
            case ["api", "datasets", owner, name, "revision", _]:
                self.answer(200, json.dumps({"id": f"{owner}/{name}", "sha": COMMIT}).encode())
            case ["api", "datasets", owner, name, "tree", _, *folder]:
                root = self.server.root / owner / name
                found = [
                    {"path": str(path.relative_to(root)), "type": "file" if path.is_file() else "directory", **UNREAD}
                    for path in root.joinpath(*folder).iterdir()
                ]
                self.answer(200, json.dumps(found).encode())
            case _:  # a service that can be done without
                self.answer(404)

    do_HEAD = do_GET

    def resolve(self, name: str, path: str) -> None:
        """A file of a repository, or where large files are stored: on another host, played by another name of this one."""
        file = self.server.root / name / path
        if not (self.server.root / name).is_dir():
            return self.answer(404, X_Error_Code="RepoNotFound")
        if name == self.server.gated:
            return self.answer(401, X_Error_Code="GatedRepo")
        if not file.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        data = file.read_bytes()
        tag = f'"{hashlib.sha256(data).hexdigest()}"'
        if file.suffix == ".md":
            return self.answer(200, data, ETag=tag, X_Repo_Commit=COMMIT)
        linked = {"X_Linked_Size": str(len(data)), "X_Linked_ETag": tag, "X_Repo_Commit": COMMIT}
        return self.answer(302, Location=f"http://localhost:{self.server.server_port}/storage/{name}/{path}", **linked)

    def answer(self, status: int, data: bytes = b"", *, stop: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:stop])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub with every layout, for processes that start from here; they see no other files."""
    for name, layout in LAYOUTS.items():
        publish(tmp_path / "hub" / name, *layout)
    for variable in [name for name in os.environ if name.startswith(("BLAQ_", "HF_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("BLAQ_CACHE", str(tmp_path / "decoded"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # another protocol for large files
    monkeypatch.setenv("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # counted on another server
    monkeypatch.setenv("NO_PROXY", "*")
    with Hub(("127.0.0.1", 0), Visit) as server:
        server.root = tmp_path / "hub"
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server
        server.shutdown()


PROGRAM = """
import sys, time, torch
from blaq.tasks.data import load_dataset
time.sleep = lambda seconds: None  # huggingface_hub would wait before it tries again
found = {}
for name in sys.argv[2:]:
    try:
        found[name] = load_dataset(name, validation=5)
    except ValueError as error:
        found[name] = str(error)
torch.save(found, sys.argv[1])
"""


def load(folder: Path, *names: str) -> dict[str, Dataset | str]:
    """The data set of each name, or what went wrong; in another process, for the hub's address is read at import."""
    subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM, folder / "found", *names], check=True, timeout=300)
    return torch.load(folder / "found", weights_only=False)


def assert_delivered(found: dict[str, Dataset | str], hub: Hub) -> None:
    """Each is bit for bit what its Parquet files give as a folder."""
    for name, dataset in found.items():
        assert isinstance(dataset, Dataset), dataset
        folder = LAYOUTS[name][0]
        files = load_dataset(str(hub.root / name / folder), validation=5)
        assert dataset.class_names == files.class_names == tuple(f"{folder} {k}" for k in range(10))
        for split in ("train", "validation", "test"):
            assert torch.equal(getattr(dataset, split).inputs, getattr(files, split).inputs)
            assert torch.equal(getattr(dataset, split).targets, getattr(files, split).targets)


def test_names_give_what_their_files_give_and_later_without_the_hub(hub, tmp_path, monkeypatch):
    assert_delivered(load(tmp_path, *LAYOUTS), hub)
    hub.shutdown()
    hub.server_close()
    for offline in ("0", "1"):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        assert_delivered(load(tmp_path, *LAYOUTS), hub)


def test_what_the_hub_does_not_deliver_it_is_asked_for_again(hub, tmp_path):
    hub.gated, hub.breaking = "ILSVRC/imagenet-1k", "ylecun/mnist"
    damaged = hub.root / "uoft-cs/cifar10"
    (damaged / "plain_text/train-00000-of-00001.parquet").write_bytes(bytes(9999))
    reasons = {
        "nobody/nothing": "Dataset 'nobody/nothing' doesn't exist on the Hub or cannot be accessed",
        "ILSVRC/imagenet-1k": ".* is a gated dataset on the Hub. You must be authenticated to access it",
        "ylecun/mnist": "peer closed connection without sending complete message body .*",
        "uoft-cs/cifar10": ".* Parquet magic bytes not found .* damaged on its way, delete '(.*)' to fetch it again",
    }
    found = load(tmp_path, *reasons)
    for name, reason in reasons.items():
        start = rf"load_dataset\(source='{name}'\): expected an existing path, or .*, but: {reason}\. Without the hub:"
        assert re.match(f"{start} .* a folder called '{Path(name).name}' and set BLAQ_DATA", found[name]), found[name]

    hub.gated = hub.breaking = ""
    publish(damaged, *LAYOUTS["uoft-cs/cifar10"])
    shutil.rmtree(re.search(reasons["uoft-cs/cifar10"], found["uoft-cs/cifar10"])[1])
    assert_delivered(load(tmp_path, "ILSVRC/imagenet-1k", "ylecun/mnist", "uoft-cs/cifar10"), hub)


def test_the_command_trains_on_a_name(hub, tmp_path):
    command = [sys.executable, "-m", "blaq", "train", "mnist-lenet5-quick", "--out", str(tmp_path / "run")]
    small = ("model.name=mlp", "model.options={hidden=[8]}", "optim.method=float")  # nothing to compile
    for setting in ("data.train=40", "data.validation=20", "data.test=20", "train.epochs=1", *small):
        command += ["--set", setting]
    subprocess.run(command, check=True, timeout=300)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test_error"] % 5 == 0  # of 20 images
