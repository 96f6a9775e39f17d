"""TOML to frozen dataclasses: keys, types, layers and overrides, on a schema of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from blaq.train import toml


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    size: int | None = None
    word: str = "w"
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class First:
    count: int
    ratio: float = 0.5
    pair: tuple[float, float] = (1.0, 2.0)
    flag: bool = False
    limit: float | None = None
    kind: Literal["plain", "fancy"] = "plain"
    mixed: int | Literal["all"] = "all"
    table: Mapping[str, int | str | Detail] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Second:
    length: int = 3
    free: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.length < 0:
            raise ValueError(f"Second(length={self.length}): expected at least 0.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    title: str
    first: First
    second: Second


ROOT = Root(title="t", first=First(count=1), second=Second())


def changed(*overrides: str) -> Root:
    return toml.build(Root, toml.override(Root, toml.to_tree(ROOT), overrides), "test")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"first": {"cuont": 1}}, "a.toml: unknown key first.cuont; did you mean first.count?"),
        ({"first": {"length": 1}}, "a.toml: unknown key first.length; did you mean second.length?"),
        ({"count": 1}, "a.toml: unknown key count; did you mean first.count?"),
        ({"extend": "b.toml"}, "a.toml: unknown key extend; did you mean extends?"),
        ({"second": {"xyzzy": 1}}, "a.toml: unknown key second.xyzzy; second has length, free."),
        ({"xyzzy": 1}, "a.toml: unknown key xyzzy; a recipe has title, first, second."),
        ({"first": {"table": {"k": {"sise": 1}}}}, "unknown key first.table.k.sise; did you mean first.table.k.size?"),
        (
            {"first": {"table": {"a": {"b": 1}}}},
            'unknown key first.table.a.b; first.table.a has size, word, note; a name with a dot needs quotes, as in "a.b".',
        ),
        ({"first": {"count": "1"}}, "a.toml: first.count='1': expected an integer."),
        ({"first": {"count": 1.0}}, "first.count=1.0: expected an integer."),
        ({"first": {"count": True}}, "first.count=True: expected an integer."),
        ({"first": {"count": "none"}}, "first.count='none': expected an integer."),
        ({"first": {"ratio": True}}, "first.ratio=True: expected a number."),
        ({"first": {"flag": 1}}, "first.flag=1: expected true or false."),
        ({"first": {"limit": "no"}}, "first.limit='no': expected a number or 'none'."),
        ({"first": {"pair": [1]}}, "first.pair=[1]: expected [a number, a number]."),
        ({"first": {"pair": [1, 2, 3]}}, "first.pair=[1, 2, 3]: expected [a number, a number]."),
        ({"first": {"pair": 1}}, "first.pair=1: expected [a number, a number]."),
        ({"first": {"kind": "fanci"}}, "first.kind='fanci': expected 'plain' or 'fancy'; did you mean 'fancy'?"),
        ({"first": {"kind": 3}}, "first.kind=3: expected 'plain' or 'fancy'."),
        ({"first": {"mixed": "some"}}, "first.mixed='some': expected an integer or 'all'."),
        ({"first": {"table": 3}}, "first.table=3: expected a table."),
        ({"first": {"table": {"k": 1.5}}}, "first.table.k=1.5: expected an integer or text or a table."),
        ({"first": 3}, "first=3: expected a table."),
        ({"title": 3}, "title=3: expected text."),
    ],
)
def test_a_wrong_key_or_type_is_an_error_that_names_the_way_out(table: toml.Tree, message: str) -> None:
    with pytest.raises(ValueError, match=r"^a\.toml: ") as raised:
        toml.check(Root, table, "a.toml")
    assert str(raised.value).endswith(message)


def test_a_misspelt_key_is_an_error_inside_a_layer_that_is_incomplete_too() -> None:
    assert toml.check(Root, {"first": {"ratio": 2}}, "a.toml") == {"first": {"ratio": 2.0}}


def test_integers_are_numbers_and_arrive_as_floats() -> None:
    tree = toml.check(Root, {"first": {"ratio": 2, "pair": [0, 1], "limit": 3, "mixed": 4}}, "a.toml")
    assert tree == {"first": {"ratio": 2.0, "pair": (0.0, 1.0), "limit": 3.0, "mixed": 4}}
    first = tree["first"]
    assert [type(x) for x in (first["ratio"], *first["pair"], first["limit"], first["mixed"])] == [float] * 4 + [int]


def test_a_missing_key_is_an_error_and_a_section_of_defaults_may_be_left_out() -> None:
    built = toml.build(Root, {"title": "t", "first": {"count": 1}}, "a.toml")
    assert built == ROOT
    with pytest.raises(ValueError, match=r"^a\.toml: missing key first\.count\.$"):
        toml.build(Root, {"title": "t"}, "a.toml")
    with pytest.raises(ValueError, match=r"^a\.toml: missing key title\.$"):
        toml.build(Root, {"first": {"count": 1}}, "a.toml")


def test_a_dataclass_own_check_is_reported_with_its_origin() -> None:
    with pytest.raises(ValueError, match=r"^a\.toml: Second\(length=-1\): expected at least 0\.$"):
        toml.build(Root, {"title": "t", "first": {"count": 1}, "second": {"length": -1}}, "a.toml")


def test_everything_is_written_and_none_has_a_spelling() -> None:
    root = Root(
        title='a "title"',
        first=First(count=1, table={"a.*": 1, "b": Detail(size=2), "c": "x"}),
        second=Second(free={"list": [1, {"deep": True}], "": {}}),
    )
    assert (
        toml.dumps(root)
        == """title = "a \\"title\\""

[first]
count = 1
ratio = 0.5
pair = [1.0, 2.0]
flag = false
limit = "none"
kind = "plain"
mixed = "all"

[first.table]
"a.*" = 1
b = {size = 2, word = "w", note = "none"}
c = "x"

[second]
length = 3

[second.free]
list = [1, {deep = true}]
"" = {}
"""
    )
    assert "table = {}\n" in toml.dumps(ROOT)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("first.count=7", First(count=7)),
        (" first.count = 7 ", First(count=7)),
        ("first.ratio=1e-3", First(count=1, ratio=1e-3)),
        ("first.ratio=3", First(count=1, ratio=3.0)),
        ("first.flag=true", First(count=1, flag=True)),
        ("first.kind=fancy", First(count=1, kind="fancy")),
        ('first.kind="fancy"', First(count=1, kind="fancy")),
        ("first.limit=4", First(count=1, limit=4.0)),
        ("first.pair=[3, 4]", First(count=1, pair=(3.0, 4.0))),
        ("first.table.a.b*=word", First(count=1, table={"a.b*": "word"})),
        ('first.table."a.b*"=word', First(count=1, table={"a.b*": "word"})),
        ("first.table.'a'=5", First(count=1, table={"a": 5})),
        ("first.table.a={size=5}", First(count=1, table={"a": Detail(size=5)})),
        ("first.table={a=1, b={word='x'}}", First(count=1, table={"a": 1, "b": Detail(word="x")})),
    ],
)
def test_an_override_sets_one_value(override: str, expected: First) -> None:
    assert changed(override) == Root(title="t", first=expected, second=Second())


def test_text_needs_no_quotes_and_may_hold_anything() -> None:
    assert changed("title=two words = 2").title == "two words = 2"
    assert changed("title=").title == ""
    assert changed("title=[not toml").title == "[not toml"
    assert changed("title=1\ncount = 5").title == "1\ncount = 5"  # one value, not two settings


@pytest.mark.parametrize(
    ("text", "value"), [(".5", 0.5), ("1.", 1.0), ("-.5e-3", -0.0005), (" 2.E1 ", 20.0), (".", "."), ("1.2.", "1.2.")]
)
def test_a_number_needs_no_digit_before_or_after_its_point(text: str, value: object) -> None:
    assert changed(f"second.free.a={text}").second.free == {"a": value}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[.9, 1.]", [0.9, 1.0]),
        ("[[.5,-.25e1], 3]", [[0.5, -2.5], 3]),
        ("{p=.1, q = 2., r=[.5]}", {"p": 0.1, "q": 2.0, "r": [0.5]}),
        ("[.5, \"a, .5, b\", '.5']", [0.5, "a, .5, b", ".5"]),
        (r'["a\" .5, \"b", .5]', ['a" .5, "b', 0.5]),
        ("[.5, x]", "[.5, x]"),  # no TOML either way: as it was written
        ("[1.2.]", "[1.2.]"),
        ("a = .5", "a = .5"),
    ],
)
def test_nor_do_the_numbers_of_a_list_or_table(text: str, value: object) -> None:
    assert changed(f"second.free.a={text}").second.free == {"a": value}


def test_none_is_a_text_where_nothing_may_be_unset() -> None:
    assert changed("title=none", "first.table.a=none", "second.free.a=none") == Root(
        title="none", first=First(count=1, table={"a": "none"}), second=Second(free={"a": "none"})
    )
    assert changed("first.table.a={note='none'}").first.table == {"a": Detail()}


def test_an_override_resets_to_none() -> None:
    assert changed("first.limit=4", "first.limit=none") == ROOT


def test_later_overrides_win() -> None:
    assert changed("first.count=2", "first.count=3").first.count == 3
    rules = changed("first.table.a=1", "first.table.b=2", "first.table.a=3").first.table
    assert list(rules.items()) == [("b", 2), ("a", 3)]  # a new key comes first, a known one stays where it is


def test_a_table_as_a_value_replaces_the_table() -> None:
    assert changed("second.free.a=1", "second.free={b=2}").second.free == {"b": 2}
    assert changed("first.table.a={size=1}", "first.table.a={word='x'}").first.table == {"a": Detail(word="x")}
    assert changed("first.table.a=1", "first.table={}").first.table == {}


def test_overriding_leaves_the_tree_as_it_was() -> None:
    tree = toml.to_tree(ROOT)
    toml.override(Root, tree, ["first.table.a=1", "first.count=5", "second.free={b=2}"])
    assert tree == toml.to_tree(ROOT)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("first.count", r"^--set first\.count: expected key=value with the key of a setting, such as"),
        ("=3", r"^--set =3: expected key=value"),
        ("first={count=1}", r"^--set first=\{count=1\}: expected key=value"),
        ("first.cuont=1", r"^--set first\.cuont=1: unknown key first\.cuont; did you mean first\.count\?"),
        ("frist.count=1", r"^--set frist\.count=1: unknown key frist; did you mean first\?"),
        ("first.count.x=1", r"^--set first\.count\.x=1: first\.count=\{'x': 1\}: expected an integer\."),
        ("first.count=x", r"^--set first\.count=x: first\.count='x': expected an integer\."),
    ],
)
def test_a_bad_override_is_an_error(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(override)


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")


def test_layers_come_child_first_and_merge_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, top="title = 'top'\n[first]\ncount = 1\nratio = 0.25\n[first.table]\na = 1\nb = 2\n")
    write(tmp_path / "sub", middle="extends = '../top.toml'\n[first]\ncount = 2\n[first.table]\nc = 3\na = 4\n")
    write(tmp_path / "sub", leaf="extends = 'middle.toml'\ntitle = 'leaf'\n[first.table]\nd = 5\n")
    leaf, middle, top = toml.read_layers(Root, tmp_path / "sub" / "leaf.toml", {})
    assert top["title"] == "top"
    assert "title" not in middle
    tree = toml.merge(toml.merge(top, middle), leaf)
    built = toml.build(Root, tree, "leaf.toml")
    assert (built.title, built.first.count, built.first.ratio) == ("leaf", 2, 0.25)
    assert list(built.first.table.items()) == [("d", 5), ("c", 3), ("a", 4), ("b", 2)]


def test_extends_finds_a_shipped_recipe_by_name(tmp_path: Path) -> None:
    write(tmp_path, base="title = 'base'")
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine", own="extends = 'base'")
    layers = toml.read_layers(Root, tmp_path / "mine" / "own.toml", {"base": tmp_path / "base.toml"})
    assert layers == [{}, {"title": "base"}]


def test_a_circle_of_extends_is_an_error(tmp_path: Path) -> None:
    write(
        tmp_path, a="extends = 'b.toml'", b="extends = 'c.toml'", c="extends = './b.toml'", own="extends = 'own.toml'"
    )
    with pytest.raises(ValueError, match=r"circle: a\.toml -> b\.toml -> c\.toml -> b\.toml\.$"):
        toml.read_layers(Root, tmp_path / "a.toml", {})
    with pytest.raises(ValueError, match=r"circle: own\.toml -> own\.toml\.$"):
        toml.read_layers(Root, tmp_path / "own.toml", {})


def test_a_mistake_names_the_file_that_it_stands_in(tmp_path: Path) -> None:
    write(tmp_path, base="[first]\ncuont = 1", leaf="extends = 'base.toml'\n[first]\ncount = 1")
    with pytest.raises(ValueError, match=r"^base\.toml: unknown key first\.cuont"):
        toml.read_layers(Root, tmp_path / "leaf.toml", {})


def test_what_cannot_be_read_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    write(tmp_path, lost="extends = 'nowhere.toml'", number="extends = 3", broken="\ntitle = x\n")
    (tmp_path / "binary.toml").write_bytes(b"title = '\xff\xfe'")
    with pytest.raises(ValueError, match=r"^lost\.toml: 'nowhere\.toml' is neither a file nor a shipped recipe"):
        toml.read_layers(Root, tmp_path / "lost.toml", {})
    with pytest.raises(ValueError, match=r"^number\.toml: extends=3: expected the path of a recipe\."):
        toml.read_layers(Root, tmp_path / "number.toml", {})
    with pytest.raises(ValueError, match=r"^broken\.toml: not a readable TOML file: Invalid value .at line 2"):
        toml.read_layers(Root, tmp_path / "broken.toml", {})
    with pytest.raises(ValueError, match=r"^binary\.toml: not a readable TOML file"):
        toml.read_layers(Root, tmp_path / "binary.toml", {})


def test_an_unknown_recipe_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    shipped = {"mnist-lenet5": tmp_path / "mnist-lenet5.toml"}
    with pytest.raises(ValueError, match=r"'mnist-lenet' is neither .* did you mean 'mnist-lenet5'\?$"):
        toml.find("mnist-lenet", tmp_path, shipped)
    with pytest.raises(ValueError, match=r"'q' is neither .*; `blaq list` shows the shipped ones\.$"):
        toml.find("q", tmp_path, shipped)
    assert toml.find("mnist-lenet5", tmp_path, shipped) == shipped["mnist-lenet5"]
