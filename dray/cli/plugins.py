"""``dray plugins``: what is installed, from where, what it can do, and why it cannot be used."""

from __future__ import annotations

import dataclasses
import math
from enum import Enum
from typing import Any

import click

from dray.cli.output import as_json, table
from dray.core import plugins
from dray.core.plugins import PluginInfo
from dray.testing import report

EXPECTED = {"safe": "UNSAFE: only if 'accept' names it", "shared": "within one process"}
"""Abilities that are worth a word when they are missing."""


@click.command("plugins")
@click.argument("kinds", nargs=-1, type=click.Choice(list(plugins.KINDS)), metavar="[KIND]...")
@click.option("--conformance", is_flag=True, help="Show what the conformance kit proved of each, by its report.")
@click.option("--json", "json_", is_flag=True, help="Print JSON.")
def plugins_command(kinds: tuple[str, ...], conformance: bool, json_: bool) -> None:
    """List the installed plugins: transports, backends, serializers, compressors, pools, hooks."""
    found = [info for kind in kinds or plugins.KINDS for info in plugins.available(kind)]
    if conformance:
        _show_conformance(found, json_)
        return
    rows = [(info, features(info)) for info in found]
    if json_:
        as_json([_record(info, abilities) for info, abilities in rows])
        return
    columns = ("kind", "name", "from", "features")
    table(
        columns,
        [
            (info.kind, info.name, f"{info.distribution} {info.version}", info.error or _short(abilities))
            for info, abilities in rows
        ],
    )


def _show_conformance(found: list[PluginInfo], json_: bool) -> None:
    records = [(info, report.find(info)) for info in found]
    if json_:
        as_json([{**_identity(info), "conformance": record} for info, record in records])
        return
    columns = ("kind", "name", "from", "kit", "date", "proven")
    table(
        columns,
        [
            (info.kind, info.name, f"{info.distribution} {info.version}", *_conformance(info, record))
            for info, record in records
        ],
    )


def _identity(info: PluginInfo) -> dict[str, str]:
    return {"kind": info.kind, "name": info.name, "distribution": info.distribution, "version": info.version}


def _conformance(info: PluginInfo, record: report.Record | None) -> tuple[str | None, str | None, str]:
    """Kit version, date, and what is proven, in a few words."""
    if record is None:
        return None, None, "not proven"
    words = [", ".join(record.get("proven", [])).replace("_", " ") or "nothing"]
    if record.get("unproven"):
        words.append(f"NOT PROVEN: {', '.join(record['unproven']).replace('_', ' ')}")
    if record.get("version") != info.version:
        words.append(f"proven for version {record.get('version')}")
    return record.get("kit"), record.get("date"), "; ".join(words)


def features(info: PluginInfo) -> dict[str, Any]:
    """What a plugin's class declares, by name; its options may refine it."""
    if info.error is not None:
        return {}
    declared = info.features
    if dataclasses.is_dataclass(declared) and not isinstance(declared, type):
        return {field.name: _plain(getattr(declared, field.name)) for field in dataclasses.fields(declared)}
    cls = plugins.load(info.kind, info.name)
    return {name: getattr(cls, name) for name in ("content_type", "safe") if hasattr(cls, name)}


def _record(info: PluginInfo, abilities: dict[str, Any]) -> dict[str, Any]:
    finite = {key: "inf" if value == math.inf else value for key, value in abilities.items()}
    return {**dataclasses.asdict(dataclasses.replace(info, features=None)), "features": finite}


def _short(abilities: dict[str, Any]) -> str:
    """Those that are there, in a few words."""
    words = []
    for name, value in abilities.items():
        label = name.replace("_", " ")
        if name == "durability":
            words.append(str(value))
        elif name == "max_body_bytes":
            words.append(f"bodies up to {value / 2**20:g} MiB")
        elif name in EXPECTED:
            words += [] if value else [EXPECTED[name]]
        elif value is True:
            words.append(label)
        elif isinstance(value, str):
            words.append(value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and value > (name == "priorities"):
            amount = "any" if value == math.inf else f"{value:g}"
            words.append(
                f"{label.removesuffix(' s')} {amount}{' s' if name.endswith('_s') and value != math.inf else ''}"
            )
    return ", ".join(words) or "-"


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Enum) else value
