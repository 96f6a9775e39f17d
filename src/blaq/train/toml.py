"""Frozen dataclasses from TOML and back: the fields and their types are the schema.

A *tree* is a nested dict of checked Python values, complete or not; layers of a recipe (a file, those it extends,
overrides) are trees, merged before the dataclass is built. TOML has no null: an optional setting is unset by the text
``none``.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from datetime import date, time
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from blaq.tasks.hints import did_you_mean

T = TypeVar("T")
Tree = dict[str, Any]

EXTENDS = "extends"

# A quoted text, to be left as it is; or the number .5 or 5., which TOML does not know, by itself or inside a list or a table.
_BARE_POINT = re.compile(
    r"""(?:"(?:\\.|[^"\\])*"|'[^']*')|(?<![^\s,=\[{])([+-]?(?:\d+\.|\.\d+)(?:e[+-]?\d+)?)(?![^\s,\]}])""",
    re.ASCII | re.IGNORECASE,
)


def read_layers(schema: type, path: Path, shipped: Mapping[str, Path]) -> list[Tree]:
    """The trees of a file and of those it extends, the file itself first.

    Raises:
        ValueError: unreadable or invalid TOML, an unknown key, a value of the wrong type, a circle of `extends`.
    """
    layers: list[Tree] = []
    seen: list[Path] = []
    while True:
        if path.resolve() in seen:
            circle = " -> ".join(step.name for step in [*seen, path])
            raise ValueError(f"{path.name}: {EXTENDS} goes in a circle: {circle}.")
        seen.append(path.resolve())
        try:
            # Editors of Windows begin a file with a byte-order mark, which TOML does not know.
            table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"{path.name}: not a readable TOML file: {error}.") from None
        parent = table.pop(EXTENDS, None)
        layers.append(check(schema, table, path.name))
        if parent is None:
            return layers
        if not isinstance(parent, str):
            raise ValueError(f"{path.name}: {EXTENDS}={parent!r}: expected the path of a recipe.")
        path = find(parent, path.parent, shipped, path.name)


def find(name: str | Path, folder: Path, shipped: Mapping[str, Path], origin: str = "recipe") -> Path:
    """The file of a path, relative to a folder, or of a shipped name.

    Raises:
        ValueError: neither exists.
    """
    path = folder / name
    if path.is_file():
        return path
    if str(name) in shipped:
        return shipped[str(name)]
    hint = did_you_mean(str(name), shipped) or "; `blaq list` shows the shipped ones."
    raise ValueError(f"{origin}: {str(name)!r} is neither a file nor a shipped recipe{hint}")


def override(schema: type, tree: Tree, overrides: Iterable[str]) -> Tree:
    """The tree with ``key=value`` overrides applied in order; a table as the value replaces the whole table.

    Raises:
        ValueError: no ``=``, a key that is unknown or no setting, a value of the wrong type.
    """
    for text in overrides:
        keys, value = split_override(schema, text)
        layer = check(schema, _nested(keys, value), f"--set {text}")
        tree = _assign(tree, keys, _at(layer, keys))
    return tree


def split_override(schema: type, text: str) -> tuple[list[str], Any]:
    """Keys and value of ``key=value``: below a table of free keys the rest of the key is one key, dots and all.

    The value is TOML, in which a number needs no digit before or after its point, as in .5; what is not TOML is text.

    Raises:
        ValueError: no ``=``, or the key of a section.
    """
    dotted, equals, written = text.partition("=")
    keys: list[str] = []
    rest: str = dotted.strip()
    hint: Any = schema
    while rest:
        if is_dataclass(hint):
            key, _, rest = rest.partition(".")
            hint = get_type_hints(hint).get(key, object)
        else:
            key, rest = rest.strip("\"'"), ""
        keys.append(key)
    if not equals or is_dataclass(hint):
        raise ValueError(f"--set {text}: expected key=value with the key of a setting, such as optim.bits=2.")
    for value in (written, _BARE_POINT.sub(lambda found: repr(float(found[0])) if found[1] else found[0], written)):
        with suppress(tomllib.TOMLDecodeError):
            table = tomllib.loads(f"value = {value}")
            if len(table) == 1:
                return keys, table["value"]
    return keys, written.strip()


def _nested(keys: Sequence[str], value: Any) -> Any:
    return {keys[0]: _nested(keys[1:], value)} if keys else value


def _at(tree: Tree, keys: Sequence[str]) -> Any:
    return _at(tree[keys[0]], keys[1:]) if keys else tree


def _assign(tree: Tree, keys: Sequence[str], value: Any) -> Tree:
    """A copy of the tree with one value set; a key it does not have comes first."""
    key, *rest = keys
    if rest:
        value = _assign(tree.get(key, {}), rest, value)
    return {**tree, key: value} if key in tree else {key: value, **tree}


def merge(base: Tree, layer: Tree) -> Tree:
    """The base with the layer's values; tables merge key by key, and the layer's new keys come first."""
    new = {key: value for key, value in layer.items() if key not in base}
    return new | {key: _merged(value, layer[key]) if key in layer else value for key, value in base.items()}


def _merged(base: Any, value: Any) -> Any:
    return merge(base, value) if isinstance(base, dict) and isinstance(value, dict) else value


def check(schema: type, table: Tree, origin: str) -> Tree:
    """The tree of a table as TOML gives it, complete or not.

    Raises:
        ValueError: an unknown key, with the nearest known one; a value of the wrong type, with the expected one.
    """
    return _Check(schema, origin).table(schema, table, ())


def build(schema: type[T], tree: Tree, origin: str) -> T:
    """The dataclass of a complete tree.

    Raises:
        ValueError: a missing key, or what the dataclasses' own checks raise, with the origin in front.
    """
    try:
        built: T = _build(schema, tree, ())
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    return built


def to_tree(value: Any, *, none: Any = None) -> Any:
    """The tree of a dataclass, with what stands for None in its fields."""
    if is_dataclass(value):
        members = {item.name: getattr(value, item.name) for item in fields(value)}
        return {name: none if member is None else to_tree(member, none=none) for name, member in members.items()}
    if isinstance(value, Mapping):
        return {key: to_tree(member, none=none) for key, member in value.items()}
    return value


def dumps(value: Any) -> str:
    """A dataclass as TOML, every field stated.

    Tables of free keys hold inline tables only: TOML wants headed ones last, and the order of rules counts.
    """
    return "\n".join(_lines(value, ())) + "\n"


def _lines(section: Any, at: tuple[str, ...]) -> Iterator[str]:
    tables: Tree = {}
    for item in fields(section):
        member = getattr(section, item.name)
        if is_dataclass(member) or (isinstance(member, Mapping) and member):
            tables[item.name] = member
        else:
            yield f"{item.name} = {_literal('none' if member is None else member)}"
    for name, table in tables.items():
        yield ""
        yield f"[{_dotted((*at, name))}]"
        if is_dataclass(table):
            yield from _lines(table, (*at, name))
        else:
            yield from (f"{_key(key)} = {_literal(member)}" for key, member in table.items())


def _literal(value: Any) -> str:
    """A value on one line of TOML."""
    if is_dataclass(value):
        value = to_tree(value, none="none")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_literal(member)}" for key, member in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON's escapes are TOML's; only DEL needs one more.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, date | time):
        return value.isoformat()
    raise ValueError(f"{value!r} cannot be written as TOML: expected a number, text, true or false, a list, a table.")


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _literal(key)


class _Check:
    """Keys and values of one layer against the schema; its messages name the layer and know the whole schema."""

    def __init__(self, schema: type, origin: str) -> None:
        self.schema = schema
        self.origin = origin

    def table(self, hint: Any, table: Tree, at: tuple[str, ...]) -> Tree:
        hints = get_type_hints(hint)
        for key in table:
            if key not in hints:
                hint_at_key = self._did_you_mean(at, key, hints)
                raise ValueError(f"{self.origin}: unknown key {_dotted((*at, key))}{hint_at_key}")
        return {key: self.value(hints[key], value, (*at, key)) for key, value in table.items()}

    def value(self, hint: Any, value: Any, at: tuple[str, ...]) -> Any:
        if value == "none" and NoneType in _members(hint):
            return None  # before the others: text would take it for a text
        for member in _members(hint):
            if not _accepts(member, value):
                continue
            if is_dataclass(member):
                return self.table(member, value, at)
            if get_origin(member) is Mapping:
                return {key: self.value(get_args(member)[1], item, (*at, key)) for key, item in value.items()}
            if get_origin(member) is tuple:
                return tuple(self.value(part, item, at) for part, item in zip(get_args(member), value, strict=True))
            return float(value) if member is float else value
        choices = [choice for member in _members(hint) if get_origin(member) is Literal for choice in get_args(member)]
        expected = " or ".join(_describe(member) for member in _members(hint))
        raise ValueError(
            f"{self.origin}: {_dotted(at)}={value!r}: expected {expected}{did_you_mean(str(value), choices) or '.'}"
        )

    def _did_you_mean(self, at: tuple[str, ...], key: str, siblings: Iterable[str]) -> str:
        """The same name in another section, else the nearest sibling, else the nearest name in any section."""
        others = {keys[-1]: keys for keys in _leaves(self.schema)}
        in_table = at != () and all(at != keys[:-1] for keys in others.values())
        if key in others and not in_table:
            return f"; did you mean {_dotted(others[key])}?"
        known = [*siblings] if at else [*siblings, EXTENDS]
        if near := difflib.get_close_matches(key, known, n=1):
            return f"; did you mean {_dotted((*at, near[0]))}?"
        if in_table:
            return f'; {_dotted(at)} has {", ".join(siblings)}; a name with a dot needs quotes, as in "{at[-1]}.{key}".'
        if near := difflib.get_close_matches(key, others, n=1):
            return f"; did you mean {_dotted(others[near[0]])}?"
        return f"; {_dotted(at) or 'a recipe'} has {', '.join(siblings)}."


def _members(hint: Any) -> Sequence[Any]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _accepts(hint: Any, value: Any) -> bool:
    """Whether a TOML value has the type of a hint that is no union; integers are numbers, booleans are not."""
    if hint is object:
        return True
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint in (bool, int, str):
        return type(value) is hint
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        return isinstance(value, list) and len(value) == len(parts) and all(map(_accepts, parts, value))
    return isinstance(value, dict) and (is_dataclass(hint) or get_origin(hint) is Mapping)


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return f"[{', '.join(_describe(part) for part in get_args(hint))}]"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", NoneType: "'none'"}
    return names.get(hint, "a table")


def _leaves(hint: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, member in get_type_hints(hint).items():
        if is_dataclass(member):
            yield from _leaves(member, (*at, key))
        else:
            yield (*at, key)


def _build(hint: Any, value: Any, at: tuple[str, ...]) -> Any:
    """Dataclasses from trees, in unions and mappings too."""
    for member in _members(hint):
        if isinstance(value, dict) and is_dataclass(member) and isinstance(member, type):
            hints = get_type_hints(member)
            values = {key: _build(hints[key], item, (*at, key)) for key, item in value.items()}
            for item in fields(member):
                if item.name not in values and item.default is MISSING and item.default_factory is MISSING:
                    if not is_dataclass(hints[item.name]):
                        raise ValueError(f"missing key {_dotted((*at, item.name))}.")
                    values[item.name] = _build(hints[item.name], {}, (*at, item.name))
            return member(**values)
        if isinstance(value, dict) and get_origin(member) is Mapping:
            return {key: _build(get_args(member)[1], item, (*at, key)) for key, item in value.items()}
    return value


def _dotted(keys: Iterable[str]) -> str:
    return ".".join(keys)
