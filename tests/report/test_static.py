"""PNG and SVG files, drawn by a real browser."""

import shutil
import threading
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blaq.cli import app
from blaq.report import static
from blaq.report.page import build
from blaq.report.read import read_runs
from blaq.report.static import positions, write_figures

WriteRun = Callable[..., Path]

needs_browser = pytest.mark.skipif(
    not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    reason="no Chrome or Chromium on this machine: install chromium to test the figures",
)


@pytest.fixture
def run(tmp_path: Path, write_run: WriteRun) -> Path:
    return write_run(tmp_path / "run", epochs=3)


@needs_browser
def test_every_position_is_written_as_png_and_svg(run: Path, tmp_path: Path) -> None:
    (figure,) = build(read_runs([run])).figures
    figure = replace(figure, y={"train_loss": figure.y["train_loss"]})
    paths = write_figures([figure], tmp_path / "figures")
    assert [path.name for path in paths] == [
        f"1-bit-binary-convergence-{x}.{suffix}" for x in ("steps", "gradient-evaluations") for suffix in ("png", "svg")
    ]
    assert set(paths) == set((tmp_path / "figures").iterdir())
    for png, svg in (paths[:2], paths[2:]):
        data = png.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(data[16:20], "big") == 1800  # twice the 900 pixels of the SVG
        root = ET.parse(svg).getroot()
        text = " ".join(root.itertext())
        assert root.attrib["width"] == "900"
        assert "Training loss at the end: LAQ: 0.407" in text
        assert ("gradient evaluations" in text) == ("gradient" in svg.name)


def test_a_title_is_not_broken_inside_a_setting(run: Path) -> None:
    (figure,) = build(read_runs([run])).figures
    title = "; ".join(f"BLAQ, a = {number / 100}" for number in range(9))
    figure = replace(figure, titles=dict.fromkeys(figure.titles, title))
    for _, _, spec in positions(figure):
        lines = spec["layout"]["title"]["text"].split("<br>")
        assert len(lines) > 1
        assert not any(line.endswith((" a", "=")) for line in lines)
        assert " ".join(lines).replace("\N{NO-BREAK SPACE}", " ") == title


def test_without_a_browser_the_error_says_what_to_do(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "none"))
    out = tmp_path / "report.html"
    done = CliRunner().invoke(app, ["report", str(run), "--out", str(out), "--figures", str(tmp_path / "figures")])
    assert done.exit_code == 2
    assert "needs Chrome or Chromium, and none was found; install one" in done.stderr
    assert "BROWSER_PATH" in done.stderr
    assert out.exists()  # the page does not need one


def test_a_browser_that_never_answers_is_tried_again_and_then_an_error(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    hang = threading.Event()

    def never_answers(*_: object, **__: object) -> None:
        calls.append(1)
        hang.wait(30)

    monkeypatch.setattr("kaleido.write_fig_from_object_sync", never_answers)
    monkeypatch.setattr(static, "SECONDS", 0.05)
    monkeypatch.setattr(static, "SECONDS_EACH", 0)
    with pytest.raises(ValueError, match="the browser has not drawn"):
        write_figures(build(read_runs([run])).figures, tmp_path / "figures")
    hang.set()
    assert len(calls) == 2
