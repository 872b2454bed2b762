"""Every setting in effect with its origin, for ``dray config show``. Secrets are masked."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from dray.core import plugins
from dray.core.config import CompressionConfig, Config, PluginChoice, WorkerConfig, settings
from dray.core.contracts import Secret
from dray.core.errors import ConfigError
from dray.core.masking import MASK, masked
from dray.core.options import hints, holds_secret


@dataclass(frozen=True, slots=True)
class Setting:
    """One line: a dotted path, its value and where it was given."""

    path: str
    value: object
    """Plain data, secrets masked."""
    origin: str
    problem: str | None = None
    """Why the plugin that is chosen here cannot be used."""


def show(config: Config) -> list[Setting]:
    """Every setting in effect, options of the chosen plugins included; loads those plugins."""
    return list(_Rows(config).of_fields(config, settings(), ""))


class _Rows:
    """Walks the configuration along its types."""

    def __init__(self, config: Config) -> None:
        self._origin = config.origin
        self._allow = config.plugins.allow

    def of_fields(self, values: object, kinds: Mapping[str, Any], path: str) -> Iterator[Setting]:
        for name, kind in kinds.items():
            yield from self._of(getattr(values, name), kind, f"{path}.{name}" if path else name)

    def _of(self, value: Any, kind: Any, path: str) -> Iterator[Setting]:
        if isinstance(value, PluginChoice):
            yield from self._of_choice(value, get_args(kind)[1], f"{path}.use", path)
        elif isinstance(value, WorkerConfig):
            yield Setting(f"{path}.queues", list(value.queues), self._origin(f"{path}.queues"))
            pool = "pool.use" if value.pool.where.path.endswith(".pool") else "pool"
            yield from self._of_choice(value.pool, "pools", f"{path}.{pool}", value.pool.where.path)
        elif isinstance(value, CompressionConfig):
            yield Setting(f"{path}.over", value.over, self._origin(f"{path}.over"))
            yield Setting(f"{path}.accept", list(value.accept), self._origin(f"{path}.accept"))
            if value.use is not None:
                yield from self._of_choice(value.use, "compressors", f"{path}.use", value.use.where.path)
        elif dataclasses.is_dataclass(value):
            yield from self.of_fields(value, hints(cast(Any, type(value))), path)
        elif isinstance(value, Mapping) and value:
            for key, item in value.items():
                yield from self._of(item, get_args(kind)[1], f"{path}.{key}")
        elif isinstance(value, tuple) and value and isinstance(value[0], PluginChoice):
            for at, item in enumerate(value):
                yield from self._of(item, get_args(kind)[0], f"{path}.{at}")
        else:
            yield self._row(path, value, kind)

    def _of_choice(self, choice: PluginChoice, kind: str, use: str, path: str) -> Iterator[Setting]:
        origin = self._origin(use)
        if origin == "default":  # a URL may have named it
            origin = self._origin(f"{path}.url")
        try:
            cls, built = plugins.configure(kind, choice, self._allow)
        except ConfigError as error:
            yield Setting(use, choice.use, origin, str(error))
            for key, value in choice.options.items():  # what is secret here only the plugin knows
                yield self._row(f"{path}.{key}", value, str if key == "url" else Secret)
            return
        yield Setting(use, choice.use, origin)
        for name, option in hints(cls.Options).items():
            yield self._row(f"{path}.{name}", getattr(built, name), option)

    def _row(self, path: str, value: object, kind: Any) -> Setting:
        plain = _plain(value)
        hidden = _hide(plain) if holds_secret(kind) else masked(plain, path.rpartition(".")[2])
        return Setting(path, hidden, self._origin(path))


def _hide(plain: object) -> object:
    if isinstance(plain, Mapping):
        return {key: _hide(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_hide(value) for value in plain]
    return None if plain is None else MASK


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.name
    return str(value) if isinstance(value, str | Path) else value
