"""YAML: for messages that people read and write. Many times slower than JSON."""

from __future__ import annotations

from typing import Any, ClassVar

import yaml

from dray.core.contracts import Serializer
from dray.core.errors import DecodeError, EncodeError
from dray.plugins._plain import DEPTH_MAX, TAG, check_key, from_tagged, to_tagged

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_SCALARS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "timestamp"))
_EXACT: tuple[tuple[type[Any], Any], ...] = ((str, str.__str__), (int, int.__int__), (float, float.__float__))


class YamlSerializer(Serializer):
    """Plain data as one YAML document.

    - Dates, times, durations, decimals, UUIDs and bytes are written as ``{__dray__: kind, v: text}``; YAML's own dates,
      as people write them, are read as well.
    - Tuples arrive as lists; subclasses of plain types arrive as the plain type.
    - Refused: aliases (an alias bomb is a few bytes that unfold to gigabytes), tags, merge keys, several documents,
      duplicate keys, keys that are not text, nesting deeper than 200.
    - Values are built from the parser's events in one flat loop, because the library's own composer recurses in C.
    """

    api: ClassVar[int] = 1
    name: ClassVar[str] = "yaml"
    content_type: ClassVar[str] = "application/yaml"

    def dumps(self, value: object) -> bytes:
        try:
            plain = _plain(value, ())
            text: str = yaml.dump(plain, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=2**20)
            return text.encode()
        except EncodeError:
            raise
        except UnicodeEncodeError:  # not chained: its repr holds the whole text
            raise EncodeError("a text holds a lone surrogate, which UTF-8 cannot carry: pass bytes instead") from None
        except Exception as error:  # huge integers, or a user's class that raises
            raise EncodeError(f"the value cannot be sent as YAML: {type(error).__name__}: {error}") from error

    def loads(self, data: bytes) -> object:
        try:
            text = str(data, "utf-8")
            if text.startswith("\ufeff"):
                raise DecodeError("not valid YAML: it starts with a byte order mark")
            loader = _Loader(text)
            try:
                return _build(loader)
            finally:
                loader.dispose()
        except DecodeError:
            raise
        except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
            raise DecodeError(f"not valid YAML: {error}") from error


def _plain(value: object, parents: tuple[int, ...]) -> object:
    """A copy of ``value`` that consists of what the safe dumper knows, and shares nothing."""
    if value is None or isinstance(value, bool):
        return value
    for plain, exact in _EXACT:
        if isinstance(value, plain):
            return exact(value)
    if not isinstance(value, (dict, list, tuple)):
        return to_tagged(value, "YAML")
    if id(value) in parents:
        raise EncodeError("the value cannot be sent as YAML: it contains itself; pass a copy without the cycle")
    if len(parents) >= DEPTH_MAX:
        raise EncodeError(f"the value is nested deeper than {DEPTH_MAX}: pass something flatter")
    parents = (*parents, id(value))
    if not isinstance(value, dict):
        return [_plain(item, parents) for item in value]
    for key in value:
        check_key(key)
    return {_plain(key, ()): _plain(item, parents) for key, item in value.items()}


class _Open:
    """A collection whose end has not been read; ``add`` takes keys and values in turn."""

    def __init__(self, is_mapping: bool) -> None:
        self.value: Any = {} if is_mapping else []
        self._is_mapping = is_mapping
        self._key: str | None = None

    def add(self, item: object) -> None:
        if not self._is_mapping:
            self.value.append(item)
        elif self._key is not None:
            self.value[self._key] = item
            self._key = None
        elif not isinstance(item, str):
            raise DecodeError("not valid YAML: a key is not text")
        elif item in self.value:
            raise DecodeError("not valid YAML: a mapping has the same key twice")
        else:
            self._key = item

    def finished(self) -> object:
        return from_tagged(self.value) if self._is_mapping and TAG in self.value else self.value


def _build(loader: Any) -> object:
    """The only document's value."""
    top = _Open(is_mapping=False)
    stack = [top]
    while not isinstance(event := loader.get_event(), yaml.StreamEndEvent):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise DecodeError("not valid YAML here: anchors and aliases are refused")
        if isinstance(event, yaml.ScalarEvent):
            stack[-1].add(_scalar(loader, event))
        elif isinstance(event, yaml.CollectionStartEvent):
            if event.tag is not None:
                raise DecodeError("not valid YAML here: tags are refused")
            if len(stack) > DEPTH_MAX:
                raise DecodeError(f"the YAML is nested deeper than {DEPTH_MAX}")
            stack.append(_Open(isinstance(event, yaml.MappingStartEvent)))
        elif isinstance(event, yaml.CollectionEndEvent):
            stack[-2].add(stack.pop().finished())
    if len(top.value) != 1:
        raise DecodeError(f"not one YAML document but {len(top.value)}")
    return top.value[0]


def _scalar(loader: Any, event: yaml.ScalarEvent) -> object:
    if event.tag is not None:
        raise DecodeError("not valid YAML here: tags are refused")
    tag = loader.resolve(yaml.ScalarNode, event.value, event.implicit)
    if tag not in _SCALARS:
        raise DecodeError(f"not valid YAML here: {event.value[:20]!r} is refused (merge keys and the like)")
    value = loader.yaml_constructors[tag](loader, yaml.ScalarNode(tag, event.value))
    if isinstance(value, str):
        value.encode()  # lone surrogates raise
    return value
