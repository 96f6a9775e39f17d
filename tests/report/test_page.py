"""The page: its tables against the run directories, and what it says where there is nothing."""

import json
import math
import re
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blaq.cli import app
from blaq.report.page import build, code_marked, write_page
from blaq.report.read import read_runs, read_sweeps
from blaq.train.config import Recipe
from blaq.train.run import train

WriteRun = Callable[..., Path]


class Tables(HTMLParser):
    """The tables of a page, as rows of cells, and the ids and headings it has."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self._cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name == "href"]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.tables[-1][-1][-1] += data


def page_of(*paths: Path) -> str:
    out = paths[0] / "report.html"
    write_page(build(read_runs(paths), read_sweeps(paths)), out)
    return out.read_text()


def body(page: str) -> str:
    """The page without its scripts."""
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


@pytest.fixture
def compared(tmp_path: Path, write_run: WriteRun) -> Path:
    for seed in range(3):
        for method, rate in (("laq", 0.3), ("blaq", 0.4)):
            loss = [math.exp(-rate * epoch) * (1 + 0.1 * seed) for epoch in range(1, 8)]
            write_run(tmp_path / "runs" / f"{method}-s{seed}", method=method, seed=seed, epochs=7, loss=loss,
                      test_error=2 + 0.1 * seed + (0.05 if method == "blaq" else 0))  # fmt: skip
    return tmp_path


def test_the_cost_table_is_that_of_the_files(compared: Path) -> None:
    cost = Tables(body(page_of(compared))).tables[0]
    cells = {row[0]: dict(zip(cost[0], row, strict=True)) for row in cost[1:]}
    assert list(cells) == ["LAQ", "BLAQ"]
    runs = {
        method: [
            (
                json.loads((run / "result.json").read_text()),
                [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()],
            )
            for run in sorted((compared / "runs").glob(f"{method}-s*"))
        ]
        for method in ("laq", "blaq")
    }
    target = max(min(row["train_loss"] for row in rows) for of in runs.values() for _, rows in of)
    for method, of in runs.items():
        row = cells[method.upper()]
        errors = [result["test_error"] for result, _ in of]
        assert row["Test error (%)"] == f"{statistics.fmean(errors):.2f} ± {statistics.stdev(errors):.2f}"
        losses = [result["train_loss"] for result, _ in of]
        assert row["Training loss"].split(" ± ")[0] == f"{statistics.fmean(losses):.{4 if method == 'blaq' else 3}f}"
        assert row["Gradients"] == f"{of[0][0]['gradient_evaluations']}"
        for name, key in (("Steps to target", "steps"), ("Gradients to target", "gradient_evaluations")):
            spent = [next(r[key] for r in rows if r["train_loss"] <= target) for _, rows in of]
            assert row[name].split(" ± ")[0] == f"{statistics.fmean(spent):.0f}"
        assert row["Time a step (ms)"] == f"{1000 * of[0][0]['seconds'] / of[0][0]['steps']:.1f}"
        assert row["Smaller than float32"] == "16.0x"
    assert "Peak memory" not in cost[0]


def test_every_run_is_listed(compared: Path) -> None:
    listed = Tables(body(page_of(compared))).tables[-1]
    assert [row[0] for row in listed[1:]] == [f"{m}-s{s}" for m in ("laq", "blaq") for s in range(3)]
    for row in listed[1:]:
        result = json.loads((compared / "runs" / row[0] / "result.json").read_text())
        assert row[4:7] == [f"{result['test_error']:.2f}", f"{result['train_loss']:.4g}", str(result["steps"])]


def test_peak_memory_and_learning_rates_are_shown_where_they_differ(tmp_path: Path, write_run: WriteRun) -> None:
    for method, lr, peak in (("laq", 0.01, 300_000_000), ("blaq", 0.02, 400_000_000)):
        path = write_run(tmp_path / method, method=method, lr=lr)
        result = json.loads((path / "result.json").read_text())
        (path / "result.json").write_text(json.dumps(result | {"peak_memory": peak}))
    cost = Tables(body(page_of(tmp_path))).tables[0]
    cells = [dict(zip(cost[0], row, strict=True)) for row in cost[1:]]
    assert [(row["Learning rate"], row["Peak memory"]) for row in cells] == [("0.01", "300.0 MB"), ("0.02", "400.0 MB")]


def test_what_is_missing_is_said_with_the_way_to_get_it(compared: Path) -> None:
    text = body(page_of(compared))
    assert text.count("No run here was probed. Repeat with <code>--set probes.every=10</code>") == 2
    assert "<code>blaq ablate RECIPE --set optim.a=0:1:0.1" in text


def test_links_and_ids(tmp_path: Path, write_run: WriteRun) -> None:
    for bits in (1, 2):
        for method in ("laq", "blaq"):
            write_run(tmp_path / f"{method}-{bits}", method=method, bits=bits, zigzag_rate=0.2)
    found = Tables(body(page_of(tmp_path)))
    assert len(set(found.ids)) == len(found.ids)
    inside = [link[1:] for link in found.links if link.startswith("#")]
    assert inside and set(inside) <= set(found.ids)
    assert {link for link in found.links if not link.startswith("#")} == {"data:,"}


def test_a_of_one_has_a_chart_of_its_own_beside_the_best_setting(tmp_path: Path, write_run: WriteRun) -> None:
    for a in (0.4, 1.0):
        write_run(tmp_path / f"a{a}", method="blaq", a=a, zigzag_rate=0.2)
    report = build(read_runs([tmp_path]))
    slugs = [figure.slug for figure in report.figures]
    assert len(set(slugs)) == len(slugs)
    assert {"1-bit-binary-weights-laq", "1-bit-binary-weights-blaq"} <= set(slugs)
    (settings,) = (figure for figure in report.figures if figure.slug == "1-bit-binary-ablation-blaq")
    title = "Validation data choose BLAQ, a = 0.4: test error 2.00 %, beside LAQ's (a = 1) 2.00 %"
    assert settings.titles["test_error "] == title


def test_text_of_a_recipe_cannot_break_the_page(tmp_path: Path, write_run: WriteRun, recipe: Recipe) -> None:
    title = "</script><script>alert(1)</script>"
    path = write_run(tmp_path / "<b>", recipe=replace(recipe, title=title), zigzag_rate=0.2)
    rows = (path / "zigzag.jsonl").read_text().replace("fc1.weight", title)  # a name inside the figures
    (path / "zigzag.jsonl").write_text(rows)
    page = page_of(tmp_path)
    assert title not in page
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in page


def test_several_tasks_share_a_page(tmp_path: Path, write_run: WriteRun, recipe: Recipe) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", recipe=replace(recipe, title="Other", data=replace(recipe.data, source="mnist")))
    report = build(read_runs([tmp_path]))
    assert [task.title for task in report.tasks] == ["Digits: a small perceptron", "Other"]
    slugs = [figure.slug for figure in report.figures]
    assert slugs == ["task-1-1-bit-binary-convergence", "task-2-1-bit-binary-convergence"]


def test_the_recipe_of_the_first_run_and_what_differs(compared: Path, write_run: WriteRun) -> None:
    write_run(compared / "runs" / "blaq-a", method="blaq", a=0.9, seed=7)
    (task,) = build(read_runs([compared])).tasks
    assert task.recipe == (compared / "runs" / "blaq-a" / "recipe.toml").read_text()
    assert list(task.differences) == ["seed: 0, 1, 2, 7", "method: blaq, laq", "a: 0.6, 0.9"]


def test_options_of_the_network_that_float_runs_lack_are_told(
    tmp_path: Path, write_run: WriteRun, recipe: Recipe
) -> None:
    plain = replace(recipe, model=replace(recipe.model, options={"inputs": 64}))
    write_run(tmp_path / "laq")
    write_run(tmp_path / "float", method="float", recipe=plain)
    (task,) = build(read_runs([tmp_path])).tasks
    assert list(task.differences) == ["seed: 0", "method: float, laq", "hidden: none, (16,)"]


def test_layers_of_a_real_run(tmp_path: Path, recipe: Recipe) -> None:
    train(recipe.with_(["train.epochs=1", "optim.bits=2", "optim.method=laq"]), tmp_path / "run", progress=False)
    page = Tables(body(page_of(tmp_path / "run")))
    (layers,) = [table for table in page.tables if table[0][0] == "Layer"]
    cells = {row[0]: dict(zip(layers[0], row, strict=True)) for row in layers[1:]}
    fc1 = cells["fc1.weight"]
    assert (fc1["Shape"], fc1["Grid"], fc1["Bits"]) == ("16 x 64", "ternary", "2")
    shares = re.fullmatch(r"-1 (.+) %; 0 (.+) %; 1 (.+) %", fc1["Levels taken"])
    assert shares is not None, fc1
    assert shares[2] == fc1["Zeros (%)"]
    assert sum(map(float, shares.groups())) == pytest.approx(100, abs=0.2)
    assert (cells["bn1.bias"]["Grid"], cells["bn1.bias"]["Bits"]) == ("float32", "32")


@pytest.mark.parametrize("damage", [lambda content: content[:1000], lambda content: b"junk", lambda content: b""])
def test_layers_of_a_damaged_checkpoint_are_those_of_the_plan(
    damage: Callable[[bytes], bytes], tmp_path: Path, recipe: Recipe
) -> None:
    train(recipe.with_(["train.epochs=1", "optim.bits=2", "optim.method=laq"]), tmp_path / "run", progress=False)
    checkpoint = tmp_path / "run" / "checkpoints" / "best.ckpt"
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    page = body(page_of(tmp_path / "run"))
    assert "LAQ, seed 0; its checkpoint is damaged and cannot be read, nor can its levels." in page
    (layers,) = [table for table in Tables(page).tables if table[0][0] == "Layer"]
    cells = {row[0]: dict(zip(layers[0], row, strict=True)) for row in layers[1:]}
    assert (cells["fc1.weight"]["Grid"], cells["fc1.weight"]["Levels taken"]) == ("ternary", "")


def test_marked_code_stands_between_backquotes() -> None:
    assert code_marked("`a` and `b`") == [(True, "a"), (False, " and "), (True, "b")]


def test_the_command(compared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(compared)
    done = CliRunner().invoke(app, ["report", "runs/laq-s0", "runs/blaq-s0"])
    assert done.exit_code == 0, done.output
    first, last = done.stdout.splitlines()
    assert first == "1 bit (binary): One seed: no claim about BLAQ and LAQ at equal steps."
    assert re.fullmatch(r"Written to report\.html \(\d\.\d MB\)", last)
    assert "2 runs, 1 seed: LAQ, BLAQ." in Path("report.html").read_text()


def test_the_command_says_first_what_the_ends_of_the_runs_say(
    tmp_path: Path, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, noise in enumerate((0.0, 0.1, 0.3)):
        write_run(tmp_path / "runs" / f"laq-s{seed}", seed=seed, epochs=20, schedule="cosine", test_error=2 + noise)
        write_run(
            tmp_path / "runs" / f"blaq-s{seed}", method="blaq", seed=seed, schedule="cosine", test_error=4 - noise
        )
    done = CliRunner().invoke(app, ["report", "runs"])
    assert done.stdout.splitlines()[0] == (
        "1 bit (binary): BLAQ is behind LAQ at equal gradient evaluations, beyond seed noise."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs", "--out", "report.pdf"], "expected the name of an HTML file"),
        (["runs", "--out", "folder.html"], "report(out='folder.html'): expected the name of an HTML file"),
        (["nowhere"], "'nowhere' holds no run"),
        (
            ["runs", "--figures", "runs/laq-s0/recipe.toml"],
            "report(figures='runs/laq-s0/recipe.toml'): expected a folder",
        ),
        (
            ["runs", "--out", "runs/laq-s0/recipe.toml/a/page.html"],
            "report(out='runs/laq-s0/recipe.toml/a/page.html'): 'runs/laq-s0/recipe.toml' is no folder",
        ),
        (
            ["runs", "--figures", "runs/laq-s0/recipe.toml/figures"],
            "'runs/laq-s0/recipe.toml' is no folder, so nothing can be made below it; choose another with --figures.",
        ),
    ],
)
def test_what_the_command_refuses(
    arguments: list[str], message: str, compared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(compared)
    Path("folder.html").mkdir()
    done = CliRunner().invoke(app, ["report", *arguments])
    assert done.exit_code == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not Path("report.html").exists()


def comparison(folder: Path, recipe: Recipe, failures: dict[str, str], target: float | None) -> None:
    """What `blaq compare` writes beside the runs, as far as the report reads it."""
    (folder / "recipe.toml").write_text(recipe.to_toml())
    (folder / "comparison.json").write_text(json.dumps({"kind": "compare", "target": target}))
    (folder / "results.json").write_text(json.dumps({"runs": [], "failures": failures}))


def test_failures_of_a_comparison_are_shown_with_their_messages(compared: Path, recipe: Recipe) -> None:
    failures = {
        "past-s0": "optim.lr=9: diverged", "past-s1": "optim.lr=9: diverged", "bwn-s0": "its process was ended by SIGKILL",
        "laq-s0": "finished by now", "laq-lr0.1-s10000": "a <rate> of the tuning",
    }  # fmt: skip
    comparison(compared, recipe, failures, None)
    page = body(page_of(compared))
    assert f"4 runs of {compared.name} failed" in page
    assert "past-s0, past-s1: optim.lr=9: diverged; bwn-s0: its process was ended by SIGKILL; " in page
    assert "a &lt;rate&gt; of the tuning" in page
    assert "finished by now" not in page
    comparison(compared, recipe, {}, None)
    assert " failed" not in body(page_of(compared))


def test_costs_are_those_to_the_target_of_the_comparison(compared: Path, recipe: Recipe) -> None:
    comparison(compared, recipe, {}, 0.25)
    (head, *rows), *_ = Tables(body(page_of(compared))).tables
    spent = {row[0]: dict(zip(head, row, strict=True))["Steps to target"] for row in rows}
    assert spent == {"LAQ": "32 ± 3", "BLAQ": "24"}  # 6 steps an epoch; 5, 5, 6 epochs and 4, 4, 4
    comparison(compared, recipe, {}, 0.07)  # laq ends at exp(-2.1) = 0.12 and above
    (head, *rows), *_ = Tables(body(page_of(compared))).tables
    spent = {row[0]: dict(zip(head, row, strict=True))["Steps to target"] for row in rows}
    assert spent["LAQ"] == "-"


@pytest.mark.parametrize("state", ["failed", "unfinished", "gone"])
def test_without_a_seed_no_cost_to_the_target_is_told(state: str, compared: Path, recipe: Recipe) -> None:
    run = compared / "runs" / "laq-s1"
    (run / "result.json").unlink()
    if state == "gone":
        shutil.rmtree(run)
    comparison(compared, recipe, {} if state == "unfinished" else {"laq-s1": "the training loss is nan"}, 0.25)
    (head, *rows), *_ = Tables(body(page_of(compared))).tables
    cells = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    names = ("Steps to target", "Gradients to target", "Time to target (s)")
    assert [cells["LAQ"][name] for name in names] == ["-"] * 3
    assert [cells["BLAQ"][name] for name in names] == ["24", "48", "4.0"]  # no seed of it is missing


def test_two_targets_are_told_and_neither_is_taken(compared: Path, recipe: Recipe, write_run: WriteRun) -> None:
    other = compared / "other"
    write_run(other / "runs" / "past-s0", method="past", epochs=7)
    comparison(compared, recipe, {}, 0.25)
    comparison(other, recipe, {}, 0.5)
    page = body(page_of(compared, other))
    assert "the lowest that every run reaches (the comparisons were given 0.25 and 0.5)" in page
