"""Arguments and return values against type hints (``@app.task(validate=True)``), by pydantic.

pydantic's usual ("lax") conversions apply, so that what JSON cannot say arrives as the hint says: a list becomes a
tuple, text a ``datetime``, a mapping a dataclass or a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

from dray.core.errors import EncodeError, InvalidArguments, PluginDriverMissing

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Validator:
    """The type hints of one function. Immutable; any thread. Raises ``PluginDriverMissing`` without pydantic."""

    def __init__(self, name: str, fn: Callable[..., Any], signature: inspect.Signature) -> None:
        try:
            from pydantic import ValidationError
        except ImportError as error:
            text = f'task {name}: validate=True needs pydantic: pip install "dray[validate]"'
            raise PluginDriverMissing(text) from error
        self._name = name
        self._signature = signature
        self._error = ValidationError
        self._hints = get_type_hints(fn, include_extras=True)
        self._adapters = {key: _adapter(hint) for key, hint in self._hints.items()}

    def load(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """For the worker: arguments as the hints say. Raises ``InvalidArguments``."""
        return self._each(args, kwargs, lambda adapter, value: adapter.validate_python(value))

    def dump(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """For the caller: checked, and as plain data (a dataclass or a model as a mapping). As :meth:`load`."""
        return self._each(args, kwargs, lambda adapter, value: adapter.dump_python(adapter.validate_python(value)))

    def dump_return(self, value: Any) -> Any:
        """A return value, checked, as plain data. Raises ``EncodeError``: trying again would give the same."""
        adapter = self._adapters.get("return")
        if adapter is None:
            return value
        try:
            return adapter.dump_python(adapter.validate_python(value))
        except self._error as error:
            hint = self._hints["return"]
            raise EncodeError(f"{self._name}: the return value does not fit {hint}: {_summary(error)}") from None

    def _each(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], convert: Callable[[TypeAdapter[Any], Any], Any]
    ) -> Arguments:
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InvalidArguments(f"{self._name}{self._signature}: {error}") from None
        for key, value in bound.arguments.items():
            adapter, kind = self._adapters.get(key), self._signature.parameters[key].kind
            if adapter is None:
                continue
            try:
                if kind is inspect.Parameter.VAR_POSITIONAL:
                    bound.arguments[key] = tuple(convert(adapter, item) for item in value)
                elif kind is inspect.Parameter.VAR_KEYWORD:
                    bound.arguments[key] = {name: convert(adapter, item) for name, item in value.items()}
                else:
                    bound.arguments[key] = convert(adapter, value)
            except self._error as error:
                raise InvalidArguments(f"{self._name}: argument {key!r}: {_summary(error)}") from None
        return bound.args, bound.kwargs


def _adapter(hint: Any) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, TypeAdapter

    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except Exception:
        return TypeAdapter(hint)  # a model or a dataclass brings its own configuration


def _summary(error: Any) -> str:
    return "; ".join(
        f"{'.'.join(map(str, item['loc'])) + ': ' if item['loc'] else ''}{item['msg']}" for item in error.errors()[:3]
    )
