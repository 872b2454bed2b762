"""Pickle: carries nearly every Python object, and runs whatever code the sender puts into it."""

from __future__ import annotations

import io
import pickle
from typing import ClassVar

from dray.core.contracts import Serializer
from dray.core.errors import DecodeError, EncodeError
from dray.plugins._plain import type_name


class PickleSerializer(Serializer):
    """Any picklable object, protocol 5.

    Reading a pickle runs code that its sender chose. So it is not ``safe``: nothing reads it unless ``accept`` lists it
    by name, and then only ``signed`` around it keeps strangers out.
    """

    api: ClassVar[int] = 1
    name: ClassVar[str] = "pickle"
    content_type: ClassVar[str] = "application/x-python-pickle"
    safe: ClassVar[bool] = False

    def dumps(self, value: object) -> bytes:
        try:
            return pickle.dumps(value, protocol=5)
        except RecursionError as error:
            raise EncodeError("the value is nested too deeply for pickle: pass something flatter") from error
        except Exception as error:  # PicklingError, TypeError, AttributeError, or whatever __reduce__ raises
            raise EncodeError(
                f"a value of type {type_name(value)}, or something in it, cannot be pickled: {type(error).__name__}: "
                f"{error}; pass plain data, or an id by which the task finds the object"
            ) from error

    def loads(self, data: bytes) -> object:
        stream = io.BytesIO(data)
        try:
            value: object = pickle.load(stream)  # noqa: S301  refused by the core unless accepted by name
        except (Exception, SystemExit) as error:  # a pickle can raise whatever it likes
            raise DecodeError(f"not a valid pickle: {type(error).__name__}: {error}") from error
        if stream.tell() != len(data):
            raise DecodeError("not a valid pickle: extra data after its end")
        return value
