"""Where settings come from: YAML, a module, the environment, code. Each value keeps the place that it came from.

All sources become the same tree of :class:`Node`.
"""

from __future__ import annotations

import importlib
import os
import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dray.core.errors import ConfigError
from dray.core.options import Loose

if TYPE_CHECKING:
    import yaml

BYTES_MAX = 1 << 20
NODES_MAX = 20_000
DEPTH_MAX = 64

_REFERENCE = r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}"
_INTEGER = r"[-+]?(?:0|[1-9][0-9_]{0,39})"
_FLOAT = r"[-+]?(?:(?:0|[1-9][0-9]{0,39})(?:\.[0-9]{0,40})?|\.[0-9]{1,40})(?:[eE][-+]?[0-9]{1,4})?"
_WORDS: Mapping[str, object] = {"": None, "~": None, "null": None, "true": True, "false": False}
_LOOSE_WORDS = {"yes": True, "on": True, "no": False, "off": False}
_TAGS = frozenset(f"tag:yaml.org,2002:{tag}" for tag in ("bool", "int", "float", "null", "timestamp", "value", "merge"))
_TAG_MAP, _TAG_SEQ, _TAG_STR, _TAG_MERGE = (f"tag:yaml.org,2002:{tag}" for tag in ("map", "seq", "str", "merge"))
_NOT_SETTINGS = r"DRAY_(?:CONFIG$|DEBUG$|FAILPOINTS|LIFELINE$|LOG|TEST_)"


class Node(NamedTuple):
    """A value and the place it came from. Mappings hold nodes by name, lists hold nodes."""

    value: Any
    origin: str


def scalar(text: str) -> object:
    """A plain word of YAML (1.2's core schema, and ``yes``, ``no``, ``on``, ``off`` where no text is wanted)."""
    word = text.lower() if text in (text.lower(), text.upper(), text.capitalize()) else text
    if word in _WORDS:
        return _WORDS[word]
    if word in _LOOSE_WORDS:
        return Loose(text, _LOOSE_WORDS[word])
    if re.fullmatch(_INTEGER, text):
        return int(text)
    if re.fullmatch(_FLOAT, text):
        return float(text)
    return text


# --- YAML --------------------------------------------------------------------------------------------------


def from_file(path: Path, name: str, environ: Mapping[str, str]) -> Node:
    """The settings in a YAML file; ``name`` is what errors call it."""
    try:
        with path.open("rb") as file:
            data = file.read(BYTES_MAX + 1)
    except IsADirectoryError:
        raise ConfigError(f"{name}: this is a directory; name the YAML file in it") from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot read the configuration: {error.strerror or error}") from error
    if len(data) > BYTES_MAX:
        raise ConfigError(f"{name}: the configuration is larger than {BYTES_MAX} bytes")
    return from_yaml(_decoded(data, name), name, environ)


def _decoded(data: bytes, name: str) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:4]:
        raise ConfigError(f"{name}: the file is UTF-16 or UTF-32; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}:{line}: the file is not UTF-8 ({error.reason}); save it as UTF-8") from error


def from_yaml(text: str, name: str, environ: Mapping[str, str]) -> Node:
    """The settings in YAML text, as a mapping with the line of each value."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_depth(yaml.parse(text, loader), name)
        tree = yaml.compose(text, loader)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, name) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: this is not YAML: {' '.join(str(error).split())}") from error
    if tree is None or (tree.tag == "tag:yaml.org,2002:null"):
        return Node({}, name)
    if tree.tag != _TAG_MAP:
        found = "a list" if tree.tag == _TAG_SEQ else "a single value"
        raise ConfigError(f"{name}:{tree.start_mark.line + 1}: expected settings as 'key: value', got {found}")
    return _YamlReader(name, environ).node(tree, "")


def _check_depth(events: Iterator[Any], name: str) -> None:
    """Refuse what is nested so deeply that composing it would not end well."""
    import yaml

    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH_MAX:
            raise ConfigError(f"{name}:{event.start_mark.line + 1}: nested more than {DEPTH_MAX} deep")


def _syntax_error(error: yaml.MarkedYAMLError, text: str, name: str) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    lines = text.splitlines()
    tab = line <= len(lines) and "\t" in lines[line - 1][: len(lines[line - 1]) - len(lines[line - 1].lstrip())]
    hint = "; indent with spaces, YAML takes no tabs" if tab else ""
    problem = " ".join(part for part in (error.problem, error.context) if part)
    return ConfigError(f"{name}:{line}: this is not YAML: {problem or 'syntax error'}{hint}")


class _YamlReader:
    """Turns composed YAML into nodes; resolves ``${NAME}``; bounds what aliases can make of a small file."""

    def __init__(self, name: str, environ: Mapping[str, str]) -> None:
        self._name = name
        self._environ = environ
        self._count = 0
        self._open: set[int] = set()

    def node(self, tree: yaml.Node, path: str) -> Node:
        self._count += 1
        if self._count > NODES_MAX:
            raise self._error(tree, path, f"more than {NODES_MAX} values; do its aliases multiply?")
        if id(tree) in self._open:
            raise self._error(tree, path, "an alias that contains itself")
        self._open.add(id(tree))
        value: object
        if tree.tag == _TAG_MAP:
            value = self._mapping(tree.value, path)
        elif tree.tag == _TAG_SEQ:
            value = [self.node(item, f"{path}.{at}") for at, item in enumerate(tree.value)]
        else:
            value = self._scalar(tree, path)
        self._open.discard(id(tree))
        return Node(value, self._origin(tree))

    def _mapping(self, pairs: list[tuple[yaml.Node, yaml.Node]], path: str) -> dict[str, Node]:
        own: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key, value in pairs:
            if key.tag == _TAG_MERGE:
                for source in value.value if value.tag == _TAG_SEQ else [value]:
                    if source.tag != _TAG_MAP:
                        raise self._error(value, path, "'<<' takes a mapping, or a list of mappings")
                    merged = self.node(source, path).value | merged
                continue
            if not isinstance(key.value, str) or not key.value:
                raise self._error(key, path, "a key has to be a word")
            below = f"{path}.{key.value}" if path else key.value
            if key.value in own:
                raise self._error(key, below, f"given twice, first at {own[key.value].origin}")
            own[key.value] = self.node(value, below)._replace(origin=self._origin(key))
        return merged | own

    def _scalar(self, tree: yaml.Node, path: str) -> object:
        if tree.tag != _TAG_STR and tree.tag not in _TAGS:
            raise self._error(tree, path, f"the tag {tree.tag} is not supported")
        text = re.sub(_REFERENCE, lambda match: self._resolve(match, tree, path), tree.value)
        if getattr(tree, "style", None):  # quoted, or a block of text
            return text
        return scalar(text) if text == tree.value else _loose(text)

    def _resolve(self, match: re.Match[str], tree: yaml.Node, path: str) -> str:
        value = self._environ.get(match[1]) or match[2]
        if value is None:
            hint = f"; set it, or give a default: ${{{match[1]}:-value}}"
            raise self._error(tree, path, f"the environment variable {match[1]} is not set{hint}")
        return value

    def _origin(self, tree: yaml.Node) -> str:
        return f"{self._name}:{tree.start_mark.line + 1}"

    def _error(self, tree: yaml.Node, path: str, problem: str) -> ConfigError:
        return ConfigError(": ".join(part for part in (self._origin(tree), path, problem) if part))


# --- modules, the environment, code ------------------------------------------------------------------------


def from_module(name: str) -> Node:
    """The settings in a Python module: its names in lower case."""
    try:
        module = importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(f"no configuration {name!r}: there is neither such a file nor such a module") from None
        raise ConfigError(
            f"importing the configuration module {name} failed: {type(error).__name__}: {error}"
        ) from error
    lines = _assignments(module)
    return Node(
        {
            key: from_code(value, f"{name}:{lines[key]}" if key in lines else name)
            for key, value in vars(module).items()
            if key == key.lower()
            and not key.startswith("_")
            and not isinstance(value, types.ModuleType | type)
            and not callable(value)
        },
        name,
    )


def _assignments(module: types.ModuleType) -> dict[str, int]:
    """The line on which each name of a module is assigned, as far as its source is there."""
    import ast

    try:
        tree = ast.parse(Path(module.__file__ or os.devnull).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return {}
    lines: dict[str, int] = {}
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        lines.update((target.id, statement.lineno) for target in targets if isinstance(target, ast.Name))
    return lines


def from_code(value: object, origin: str) -> Node:
    """Settings given as Python values."""
    if isinstance(value, Mapping):
        return Node({str(key): from_code(item, origin) for key, item in value.items()}, origin)
    if isinstance(value, list | tuple | set | frozenset) and not hasattr(value, "_fields"):
        return Node([from_code(item, origin) for item in value], origin)
    return Node(value, origin)


def from_environment(environ: Mapping[str, str]) -> Iterator[Node]:
    """The settings in ``DRAY_...``, one node each, outer ones first: ``DRAY_WORKERS__IO__SIZE`` is workers.io.size."""
    names = [name for name in environ if name.startswith("DRAY_") and not re.match(_NOT_SETTINGS, name)]
    for name in sorted(names, key=lambda item: (item.count("__"), item)):
        origin = f"environment {name}"
        *outer, last = path = name.removeprefix("DRAY_").lower().split("__")
        if not all(path):
            raise ConfigError(f"{origin}: this names no setting; write DRAY_NAME or DRAY_OUTER__INNER")
        text = _loose(environ[name])
        value = text.value if isinstance(text.value, dict | list) else text
        node = Node({last: from_code(value, origin)}, origin)
        for key in reversed(outer):
            node = Node({key: node}, origin)
        yield node


def _loose(text: str) -> Loose:
    """Text from the environment: also a list or a mapping if it is written as one."""
    if text[:1] in ("[", "{"):
        import yaml

        try:
            return Loose(text, yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))  # noqa: S506
        except (yaml.YAMLError, ValueError, RecursionError):
            return Loose(text, text)
    value = scalar(text)
    return Loose(text, value.value if isinstance(value, Loose) else value)


# --- the outcome ---------------------------------------------------------------------------------------------


def flatten(node: Node, path: str = "") -> tuple[Any, dict[str, str]]:
    """The plain value of a tree, and the origin of each dotted path in it."""
    origins = {path: node.origin} if path else {}
    if not isinstance(node.value, dict | list):
        return node.value, origins
    items = node.value.items() if isinstance(node.value, dict) else enumerate(node.value)
    plain = {}
    for key, child in items:
        plain[key], below = flatten(child, f"{path}.{key}" if path else str(key))
        origins |= below
    return (plain if isinstance(node.value, dict) else list(plain.values())), origins
