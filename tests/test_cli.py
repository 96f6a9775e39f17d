"""The command: what it prints, where, and with which exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from blaq.__main__ import main
from blaq.cli import app
from blaq.train.config import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig, recipe_paths

RECIPE = Recipe(
    name="tiny",
    title="a few digits, a small perceptron",
    data=DataConfig(source="digits", train=300, validation=100, test=200, batch_size=50),
    model=ModelConfig(name="mlp", loss="squared_hinge", options={"inputs": 64, "hidden": [16]}),
    optim=OptimConfig(bits=3, lr=0.01),
    train=TrainConfig(epochs=2, seed=5, threads=1),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with the recipe tiny.toml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(RECIPE.to_toml())
    return tmp_path


def blaq(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_train_eval_and_inspect(folder: Path) -> None:
    trained = blaq("train", "tiny.toml", "--set", "optim.period=2")
    assert trained.exit_code == 0, trained.output
    run = Path("runs/tiny-blaq-b3-s5")
    result = json.loads((run / "result.json").read_text())
    assert result["gradient_evaluations"] == 18  # 6 steps, then 6 of two
    lines = trained.stdout.splitlines()
    assert lines[0].startswith("name ")
    assert "fc1.weight  16 x 64  linear3 per tensor" in trained.stdout
    epochs = [line for line in lines if line.startswith("epoch")]
    assert [line[:9] for line in epochs] == ["epoch 1/2", "epoch 2/2"]
    assert "gradients 18" in epochs[1]
    assert lines[-1].startswith(f"{run}: test error {result['test_error']:.2f} %")
    assert trained.stderr == ""

    evaluated = blaq("eval", str(run), "--checkpoint", "last", "--split", "test")
    assert evaluated.exit_code == 0
    assert f"test error {result['test_error_last']:.2f} %" in evaluated.stdout

    inspected = blaq("inspect", str(run))
    assert inspected.exit_code == 0
    assert "linear3" in inspected.stdout
    assert "of 7 levels" in inspected.stdout


def test_plan_tells_sizes_and_memory_without_the_data(folder: Path) -> None:
    (folder / "tiny.toml").write_text(RECIPE.to_toml().replace("digits", "nobody/has-this"))
    planned = blaq("plan", "tiny.toml", "--set", "optim.method=past")
    assert planned.exit_code == 0, planned.output
    lines = planned.output.splitlines()
    assert lines[1].split()[:6] == ["fc1.weight", "16", "x", "64", "linear3", "per"]
    assert lines[-2].startswith("training takes ")
    assert lines[-1].startswith("  trial past: moments ")
    assert "trial none: moments" in blaq("plan", "tiny.toml", "--set", "optim.method=float").output


def test_paths_are_printed_as_they_are(folder: Path) -> None:
    trained = blaq("train", "tiny.toml", "--set", "train.epochs=1", "--set", "optim.lr=.01", "--out", ":100:/[b]a")
    assert trained.exit_code == 0, trained.output
    assert trained.stdout.splitlines()[-1].startswith(":100:/[b]a: test error ")


def test_a_float_run_is_named_without_bits(folder: Path) -> None:
    assert blaq("train", "tiny.toml", "--set", "optim.method=float", "--set", "train.epochs=1").exit_code == 0
    assert Path("runs/tiny-float-s5/result.json").exists()


def test_resuming_a_finished_run_shows_its_result(folder: Path) -> None:
    first = blaq("train", "tiny.toml", "--out", "run")
    again = blaq("train", "tiny.toml", "--out", "run", "--resume")
    assert again.exit_code == 0
    assert again.stdout.splitlines() == ["run is finished.", first.stdout.splitlines()[-1]]


@pytest.mark.usefixtures("server")
def test_compare_and_repeat(folder: Path) -> None:
    command = ("compare", "tiny.toml", "--methods", "laq,blaq", "--seeds", "2", "--workers", "1", "--out", "out")
    compared = blaq(*command)
    assert compared.exit_code == 0, compared.output
    assert {path.name for path in Path("out").iterdir()} == {
        "runs", "comparison.json", "recipe.toml", "results.csv", "results.json", "results.md",
    }  # fmt: skip
    assert {path.name for path in Path("out/runs").iterdir()} == {"laq-b3-s5", "laq-b3-s6", "blaq-b3-s5", "blaq-b3-s6"}
    assert "Look at test error: laq has" in compared.stdout
    assert compared.stdout.splitlines().count("data digits from scikit-learn") == 1
    before = Path("out/runs/blaq-b3-s6/metrics.jsonl").stat().st_mtime_ns
    repeated = blaq(*command)
    assert Path("out/runs/blaq-b3-s6/metrics.jsonl").stat().st_mtime_ns == before
    assert repeated.stdout == compared.stdout


@pytest.mark.usefixtures("server")
def test_a_failing_run_leaves_the_others(folder: Path) -> None:
    Path("out/runs/laq-b3-s5").mkdir(parents=True)
    Path("out/runs/laq-b3-s5/notes.txt").touch()
    compared = blaq("compare", "tiny.toml", "--methods", "laq,float", "--seeds", "2", "--out", "out")
    assert compared.exit_code == 1
    refused = "laq-b3-s5 (1/4): failed: train(out='out/runs/laq-b3-s5'): expected a new or empty directory"
    assert refused in compared.stdout
    assert compared.stderr == "Failed: laq-b3-s5\n"
    content = json.loads(Path("out/results.json").read_text())
    assert refused.partition("failed: ")[2] in content["failures"]["laq-b3-s5"]
    rows = content["runs"]
    assert [(row["method"], row["seed"]) for row in rows] == [("laq", 6), ("float", 5), ("float", 6)]


@pytest.mark.usefixtures("server")
def test_a_failure_after_the_last_success_is_written_too(folder: Path) -> None:
    Path("out/runs/laq-b3-s6").mkdir(parents=True)
    Path("out/runs/laq-b3-s6/notes.txt").touch()
    command = ("compare", "tiny.toml", "--methods", "laq", "--seeds", "2", "--out", "out")
    assert blaq(*command).exit_code == blaq(*command).exit_code == 1  # the second finds the first seed finished
    assert list(json.loads(Path("out/results.json").read_text())["failures"]) == ["laq-b3-s6"]
    assert "Failed: laq-b3-s6: train(out='out/runs/laq-b3-s6')" in Path("out/results.md").read_text()


@pytest.mark.usefixtures("server")
def test_ablate_runs_the_grid(folder: Path) -> None:
    train = ("--set", "train.epochs=1", "--seeds", "1")
    ablated = blaq("ablate", "tiny.toml", "--set", "optim.a=0.9:1:0.1", *train)
    assert ablated.exit_code == 0, ablated.output
    assert {path.name for path in Path("runs/tiny-ablate/runs").iterdir()} == {"a0.9-s5", "a1-s5"}
    assert "the lowest validation error has a=" in ablated.stdout
    assert ablated.stdout.splitlines().count("data digits from scikit-learn") == 1
    assert json.loads(Path("runs/tiny-ablate/comparison.json").read_text())["sets"] == {"optim.a": ["0.9", "1"]}


def test_list_names_everything(folder: Path) -> None:
    listed = blaq("list")
    assert listed.exit_code == 0
    for name in [*(path.stem for path in recipe_paths()), "laq", "past", "lenet5", "char_lstm", "midrise8", "ternary2"]:
        assert name in listed.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "tiny.toml", "--set", "optim.bit=2"), "unknown key optim.bit; did you mean optim.bits?"),
        (("train", "tyni.toml"), "tyni.toml"),
        (("eval", "runs/none"), "'runs/none' holds no run"),
        (("eval", ":100:/[red]a[/red]"), "':100:/[red]a[/red]' holds no run"),
        (("inspect", "runs/none"), "'runs/none' holds no run"),
        (
            ("inspect", "m.onnx"),
            "'m.onnx' is a file for ONNX Runtime, expected a run or a packed file; how such a file",
        ),
        (("compare", "tiny.toml", "--methods", "laq,lqa"), "lqa"),
        (
            ("compare", "tiny.toml", "--methods", "laq,laq"),
            "compare(methods='laq,laq'): expected at least one, each once.",
        ),
        (("compare", "tiny.toml", "--set", "train.seed=3"), "a comparison sets this itself; use --seeds"),
        (("compare", "tiny.toml", "--set", "optim={bits=2}"), "a comparison sets this itself; use --methods"),
        (("compare", "tiny.toml", "--bits", "1,2", "--set", "optim.bits=3"), "use --bits"),
        (("compare", "tiny.toml", "--lr", "0.1", "--set", "optim.lr=0.3"), "use --lr"),
        (("compare", "tiny.toml", "--lr", "0.1,low"), "--lr low: expected numbers separated by commas."),
        (("compare", "tiny.toml", "--bits", "1,ternery"), "ternary"),
        (("ablate", "tiny.toml", "--set", "train.seed=3,4"), "a comparison sets this itself; use --seeds"),
        (("ablate", "tiny.toml", "--set", "optim.a=0.5"), "expected several values of some setting"),
        (("ablate", "tiny.toml", "--set", "optim.a=0.5,1", "--set", "optim.a=0"), "each setting once"),
        (("ablate", "tiny.toml", "--set", "optim.a=0:1:0.3"), "expected a stop that whole steps reach"),
        (("ablate", "tiny.toml", "--set", "optim.aa=0.5,0.7"), "did you mean optim.a?"),
        (("train", "tiny.toml", "--out", "tiny.toml/a/b"), "train(out='tiny.toml/a/b'): 'tiny.toml' is no folder"),
        (("compare", "tiny.toml", "--out", "tiny.toml/a"), "compare(out='tiny.toml/a'): 'tiny.toml' is no folder"),
        (
            ("ablate", "tiny.toml", "--set", "optim.a=0.5,1", "--out", "tiny.toml/a"),
            "ablate(out='tiny.toml/a'): 'tiny.toml' is no folder, so nothing can be made below it; choose another with --out.",
        ),
    ],
)
def test_errors_are_one_line_on_standard_error(arguments: tuple[str, ...], message: str, folder: Path) -> None:
    failed = blaq(*arguments)
    assert failed.exit_code == 2
    assert failed.stdout == ""
    assert message in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("command", "target", "message"),
    [
        ("train", "blaq.train.run.train", "Interrupted before the first step.\n"),
        (
            "compare",
            "blaq.train.sweep.Sweeper.run",
            "Interrupted. The same command continues; finished runs are kept.\n",
        ),
        ("eval", "blaq.train.run.evaluate", "Interrupted.\n"),
    ],
)
def test_ctrl_c_exits_with_130(
    command: str, target: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(target, interrupted)
    stopped = blaq(command, "tiny.toml")
    assert stopped.exit_code == 130
    assert stopped.stderr == message


@pytest.mark.parametrize("arguments", [("train",), ("eval", "run", "--split", "train"), ("trian",)])
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...], folder: Path) -> None:
    assert blaq(*arguments).exit_code == 2


def test_a_bug_keeps_its_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blaq.train.run.evaluate", lambda *_, **__: 1 / 0)
    assert isinstance(blaq("eval", "run").exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("missing", "importer", "command", "extra"),
    [
        ("typer", "blaq.cli", "list", "train"),
        ("rich", "blaq.cli", "list", "train"),
        ("lightning.pytorch", "blaq.train.run", "eval run", "train"),
        ("openvino", "blaq.export.openvino", "bench there.xml", "openvino"),
        ("onnx", "blaq.export.onnx", "bench there.onnx", "onnx"),
        ("jinja2", "blaq.report.page", "report run --out page.html", "report"),
    ],
)
def test_a_missing_extra_says_what_to_install(
    missing: str,
    importer: str,
    command: str,
    extra: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for suffix in (".xml", ".bin", ".onnx"):
        Path("there").with_suffix(suffix).touch()
    monkeypatch.setitem(sys.modules, missing, None)  # importing it fails as if it were not there
    for name in [name for name in sys.modules if name.partition(importer)[:2] == ("", importer)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "argv", ["blaq", *command.split()])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    package = missing.partition(".")[0]
    assert capsys.readouterr().err == f"blaq: {package} is not installed; pip install 'blaq[{extra}]'\n"


def test_python_m_blaq_and_what_import_blaq_brings_along() -> None:
    code = (
        "import runpy, sys, blaq; sys.argv = ['blaq', '--help'];"
        "print([name for name in ('lightning', 'typer', 'rich', 'blaq.train') if name in sys.modules]);"
        "runpy.run_module('blaq', run_name='__main__')"
    )
    helped = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert (helped.returncode, helped.stderr) == (0, "")
    imported, *usage = helped.stdout.splitlines()
    assert imported == "[]"
    for command in ("train", "eval", "compare", "ablate", "list", "inspect"):
        assert any(command in line for line in usage)
