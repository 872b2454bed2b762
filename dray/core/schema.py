"""JSON Schema (draft 2020-12) of the configuration file, with the options of the plugins that are installed here."""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from dray.core import plugins
from dray.core.config import Config, PluginChoice, settings
from dray.core.options import NAME_LENGTH_MAX, Min, hints

Schema = dict[str, Any]

_REFERENCE: Schema = {"$ref": "#/$defs/reference"}
_DEFS: Schema = {
    "reference": {"type": "string", "pattern": r"\$\{[A-Za-z_][A-Za-z0-9_]*(:-[^}]*)?\}", "description": "${VARIABLE}"},
    "name": {"type": "string", "minLength": 1, "maxLength": NAME_LENGTH_MAX},
    "seconds": {
        "description": "a length of time",
        "anyOf": [
            {"type": "number", "minimum": 0},
            {"type": "string", "pattern": r"^\s*(\d+(\.\d+)?\s*(ms|s|m|h|d|w)?\s*)+$"},
            _REFERENCE,
        ],
    },
    "size": {
        "description": "a number of bytes",
        "anyOf": [
            {"type": "integer", "minimum": 0},
            {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*([KkMmGgTt]?[Ii]?[Bb])?\s*$"},
            _REFERENCE,
        ],
    },
}
_PLAIN: Mapping[Any, Schema] = {
    str: {"type": "string"},
    Path: {"type": "string"},
    types.NoneType: {"type": "null"},
    bool: {"anyOf": [{"type": "boolean"}, _REFERENCE]},
    int: {"anyOf": [{"type": "integer"}, _REFERENCE]},
    float: {"anyOf": [{"type": "number"}, _REFERENCE]},
}


def json_schema() -> Schema:
    """The schema of the whole file. Imports every installed plugin."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "dray.yaml",
        **_object(Config, settings(), required=False),
        "$defs": _DEFS,
    }


def schema(kind: Any) -> Schema:
    """The schema of what the type ``kind`` is filled from; refers to ``#/$defs``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _marked(*arguments)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [schema(member) for member in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": schema(arguments[1])}
    if isinstance(origin, type):
        return {"type": "array", "items": schema(arguments[0])}
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {"enum": list(kind.__members__)}
    if hasattr(kind, "from_raw"):
        return _mixed(kind)
    if dataclasses.is_dataclass(kind):
        return _object(typing.cast(type, kind), hints(typing.cast(Any, kind)))
    return _PLAIN.get(kind, {})


def docs(cls: type) -> dict[str, str]:
    """The text below each field of a dataclass, as far as its source is there."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return {}
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    return {
        field.target.id: " ".join(str(text.value.value).split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def _marked(base: Any, *marks: Any) -> Schema:
    if base is PluginChoice:
        return _choice(marks[0])
    for mark in marks:
        if mark in ("seconds", "size", "name"):
            return {"$ref": f"#/$defs/{mark}"}
        if isinstance(mark, Min):
            return {"anyOf": [{"type": "integer", "minimum": mark.value}, _REFERENCE]}
    return schema(base)


def _object(cls: type, kinds: Mapping[str, Any], *, required: bool = True) -> Schema:
    """A mapping with these keys and no others."""
    texts = docs(cls)
    fields = {item.name: item for item in dataclasses.fields(typing.cast(Any, cls)) if item.name in kinds}
    properties: Schema = {}
    for name, kind in kinds.items():
        default = fields[name].default
        properties[name] = {
            **schema(kind),
            **({"description": texts[name]} if name in texts else {}),
            **({"default": default} if isinstance(default, str | int | float) and not _is_secret(kind) else {}),
        }
        if isinstance(default, enum.Enum):
            properties[name]["default"] = default.name
    needed = [
        name
        for name, item in fields.items()
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    return {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        **({"required": needed} if needed and required else {}),
    }


def _is_secret(kind: Any) -> bool:
    return get_origin(kind) is Annotated and "secret" in get_args(kind)


def _choice(kind: str) -> Schema:
    """A name, one URL or several, or a mapping with the options of one of the installed plugins."""
    shapes = _plugin_shapes(kind)
    forms: list[Schema] = [{"type": "string", "minLength": 1, "examples": sorted(shapes)}]
    for name, shape in shapes.items():
        forms.append(_with_keys(shape, {"use": {"const": name}}, required=["use"]))
        if "url" in shape["properties"]:
            one: Schema = {"type": "string", "pattern": f"^{re.escape(name)}://"}
            several: Schema = {"type": "array", "items": one, "minItems": 1}
            forms += [several, _with_keys(shape, {"url": {"anyOf": [one, several]}}, required=["url"])]
    forms.append(_other(shapes, "use"))
    return {"anyOf": forms}


def _mixed(cls: Any) -> Schema:
    """A mapping whose own keys stand beside the options of the plugin that one of them names."""
    kinds = {key: kind for key, kind in hints(cls).items() if key in cls.KEYS}
    key, kind = next((key, mark) for key, item in kinds.items() if (mark := _plugin_kind(item)) is not None)
    own = _object(cls, {name: item for name, item in kinds.items() if name != key})
    default: Any = next(item.default for item in dataclasses.fields(cls) if item.name == key)
    shapes = _plugin_shapes(kind)
    forms: list[Schema] = [{"type": "null"}]
    if default is None:
        forms += [{"type": "string", "minLength": 1}, own]
    for name, shape in shapes.items():
        long = _with_keys(shape, {"use": {"const": name}}, required=["use"])
        keys = {**own["properties"], key: {"anyOf": [{"const": name}, long]}}
        forms.append(_with_keys(shape, keys, required=[] if default and default.use == name else [key]))
    forms.append(_other(shapes, key))
    return {"anyOf": forms}


def _plugin_kind(kind: Any) -> str | None:
    """The kind of plugin that a field chooses; None: it chooses none."""
    if get_origin(kind) is Annotated and get_args(kind)[0] is PluginChoice:
        return str(get_args(kind)[1])
    return next((found for item in get_args(kind) if (found := _plugin_kind(item))), None)


def _plugin_shapes(kind: str) -> dict[str, Schema]:
    """The options of each installed plugin of a kind whose driver is there."""
    infos = plugins.available(kind)
    classes = {info.name: plugins.load(kind, info.name) for info in infos if info.error is None}
    return {name: schema(cls.Options) for name, cls in classes.items()}


def _with_keys(shape: Schema, keys: Schema, required: list[str]) -> Schema:
    needed = list(dict.fromkeys([*required, *shape.get("required", ())]))
    return {**shape, "properties": {**shape["properties"], **keys}, **({"required": needed} if needed else {})}


def _other(known: Mapping[str, Schema], key: str) -> Schema:
    """A plugin that is not installed here."""
    unknown: Schema = {"type": "string", "not": {"enum": sorted(known)}}
    if key != "use":  # the long form, where the plugin is chosen by another key
        unknown = {"anyOf": [unknown, {"type": "object", "properties": {"use": unknown}, "required": ["use"]}]}
    return {"type": "object", "properties": {key: unknown}, "required": [key]}
