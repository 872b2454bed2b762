"""Arguments and return values against type hints (``@app.task(validate=True)``), by pydantic.

pydantic's usual ("lax") conversions apply, so that what JSON cannot say arrives as the hint says: a list becomes a
tuple, text a ``datetime``, a mapping a dataclass or a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from dray.core.errors import InvalidArguments, PluginDriverMissing, TaskError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def validators(
    name: str, fn: Callable[..., Any], signature: inspect.Signature
) -> tuple[Callable[[tuple[Any, ...], Mapping[str, Any]], Arguments], Callable[[Any], Any]]:
    """Two functions: arguments -> converted ones (``InvalidArguments``), return value -> converted (``TaskError``)."""
    try:
        from pydantic import ConfigDict, TypeAdapter, ValidationError
    except ImportError as error:
        raise PluginDriverMissing(f'task {name}: validate=True needs pydantic: pip install "dray[validate]"') from error

    hints = get_type_hints(fn, include_extras=True)

    def adapter(hint: Any) -> TypeAdapter[Any]:
        try:
            return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
        except Exception:
            return TypeAdapter(hint)  # a model or a dataclass brings its own configuration

    adapters = {key: adapter(hint) for key, hint in hints.items() if key != "return"}
    returns = adapter(hints["return"]) if "return" in hints else None

    def check(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InvalidArguments(f"{name}{signature}: {error}") from None
        for key, value in bound.arguments.items():
            if key not in adapters:
                continue
            convert, kind = adapters[key].validate_python, signature.parameters[key].kind
            try:
                if kind is inspect.Parameter.VAR_POSITIONAL:
                    bound.arguments[key] = tuple(convert(item) for item in value)
                elif kind is inspect.Parameter.VAR_KEYWORD:
                    bound.arguments[key] = {k: convert(item) for k, item in value.items()}
                else:
                    bound.arguments[key] = convert(value)
            except ValidationError as error:
                raise InvalidArguments(f"{name}: argument {key!r}: {_summary(error)}") from None
        return bound.args, bound.kwargs

    def check_return(value: Any) -> Any:
        if returns is None:
            return value
        try:
            return returns.validate_python(value)
        except ValidationError as error:
            raise TaskError(f"{name}: the return value does not fit {hints['return']}: {_summary(error)}") from None

    return check, check_return


def _summary(error: Any) -> str:
    return "; ".join(
        f"{'.'.join(map(str, item['loc'])) + ': ' if item['loc'] else ''}{item['msg']}" for item in error.errors()[:3]
    )
