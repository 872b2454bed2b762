"""Tasks whose arguments and values are checked."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Annotated

from pydantic import Field


def total(days: list[date]) -> Annotated[int, Field(ge=1)]:
    """The days between the first and the last."""
    return (max(days) - min(days)).days if days else 0


@dataclass
class Order:
    name: str
    count: int


def priced(order: Order) -> Order:
    return order
