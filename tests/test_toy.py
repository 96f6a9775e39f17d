"""The toy examples show what they say, and the page on zig-zagging tells what they print."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("toy", ROOT / "examples" / "toy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_one_gradient_goes_to_and_fro_without_end(toy: ModuleType) -> None:
    assert toy.newton_path(1.0, 6) == pytest.approx([1, -1, 1, -1, 1, -1, 1])


@pytest.mark.parametrize("a", [0.5, 0.6, 0.7, 0.9])
def test_forward_and_back_multiplies_by_three_minus_four_a(a: float, toy: ModuleType) -> None:
    assert toy.newton_path(a, 6) == pytest.approx([(3 - 4 * a) ** t for t in range(7)])


def test_three_quarters_arrive_at_once(toy: ModuleType) -> None:
    assert toy.newton_path(0.75, 1)[1] == pytest.approx(0.0, abs=1e-12)


def test_the_page_has_the_numbers_of_the_valley(toy: ModuleType) -> None:
    page = (ROOT / "docs" / "zigzag.md").read_text(encoding="utf-8")
    for name, a in (("LAQ", 1.0), ("BLAQ", toy.A_2D)):
        row = re.search(
            rf"^\| {name}.*?\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE
        )
        assert row is not None
        way = toy.walk(a)
        m = way.measures
        found = [m.zigzag_rate, m.path_efficiency, m.flip_rate, sum(way.loss[-20:]) / 20]
        assert int(row[1]) == way.gradient_evaluations
        assert [float(row[i]) for i in range(2, 6)] == pytest.approx(found, abs=0.0051)


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "zigzag.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    assert "total Measures(gradient_cosine=" in capsys.readouterr().out
    assert names["zigzag"].read()["total"].gradient_error is None  # read already


def test_the_picture(toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly")
    monkeypatch.setattr(sys, "argv", ["toy.py", "--out", str(tmp_path / "toy.html")])
    toy.main()
    page = (tmp_path / "toy.html").read_text(encoding="utf-8")
    assert "Plotly.newPlot" in page
    assert not re.search(r"""<(script|link)[^>]+(src|href)=["']http""", page)  # opens offline
