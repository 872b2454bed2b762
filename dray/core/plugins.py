"""Plugins by name: an entry point of the group ``dray.<kind>`` to its class, only the one that is named.

Four things can be wrong with a plugin, and each is an error of its own: no such name, its driver is not installed, it
speaks another version of the interface, importing it raised.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dray.core.contracts import (
    API_VERSION,
    Compressor,
    Plugin,
    PluginContext,
    Pool,
    ResultBackend,
    Serializer,
    Signer,
    Transport,
)
from dray.core.errors import (
    ConfigError,
    PluginConflict,
    PluginDriverMissing,
    PluginError,
    PluginImportFailed,
    PluginIncompatible,
    PluginNotFound,
    PluginRefused,
)
from dray.core.masking import shown
from dray.core.options import Loose, Where, build, suggest

if TYPE_CHECKING:
    from importlib.metadata import Distribution, EntryPoint

Allow = Mapping[str, str] | None
"""``plugins.allow``: the distribution that each plugin has to come from; None: any may come from anywhere."""

KINDS: Mapping[str, tuple[type[Any], ...]] = {
    "transports": (Transport,),
    "backends": (ResultBackend,),
    "serializers": (Serializer, Signer),
    "compressors": (Compressor,),
    "pools": (Pool,),
    "hooks": (Plugin,),
}
"""Each kind with the classes that a plugin of it may derive from."""

_SCHEME = r"([A-Za-z][A-Za-z0-9+.-]*)://"


@dataclass(frozen=True, slots=True)
class PluginChoice:
    """A plugin that the configuration names, with its options as they were written."""

    use: str
    options: Mapping[str, object] = field(default_factory=dict, repr=False)
    where: Where = field(default_factory=Where, repr=False, compare=False)

    @classmethod
    def from_raw(cls, raw: object, where: Where) -> PluginChoice:
        """From ``sqlite``, ``{use: sqlite, ...options}``, or a URL (or several) whose scheme names the plugin."""
        if isinstance(raw, PluginChoice):
            return raw
        fields = plugin_fields(raw.value if isinstance(raw, Loose) and not isinstance(raw.value, str) else raw)
        if fields is None:
            raise where.error(f"expected a plugin's name, a URL or a mapping with 'use', got {shown(raw)}")
        use = plugin_name(fields)
        if use is None:
            raise where.error("which plugin? add 'use: NAME', or a 'url' whose scheme names it")
        if not isinstance(use, str) or not use.strip():
            raise where.child("use").error(f"expected a plugin's name, got {shown(use)}")
        return cls(str(use), {key: value for key, value in fields.items() if key != "use"}, where)


def plugin_fields(raw: object) -> Mapping[str, Any] | None:
    """The long form of a choice: a name is ``{use: name}``, a URL or a list of them ``{url: ...}``; None: neither."""
    if isinstance(raw, str):
        return {"url": raw} if re.match(_SCHEME, raw) else {"use": raw}
    if isinstance(raw, list | tuple) and raw and all(isinstance(url, str) and re.match(_SCHEME, url) for url in raw):
        return {"url": raw}
    return raw if isinstance(raw, Mapping) else None


def plugin_name(fields: Mapping[str, Any]) -> Any:
    """The name of the plugin in the long form; None when it is left out."""
    if fields.get("use") is not None:
        return fields["use"]
    url = fields.get("url")
    first = url[0] if isinstance(url, list | tuple) and url else url
    match = re.match(_SCHEME, first) if isinstance(first, str) else None
    return match[1].lower() if match else None


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """An installed plugin, for people."""

    name: str
    kind: str
    distribution: str
    version: str
    target: str
    error: str | None
    """Why it cannot be used; None: it can."""
    features: object | None
    """The features that the class declares; None: the kind has none, or it cannot be loaded."""


def load(kind: str, name: str, allow: Allow = None) -> type[Any]:
    """The class of the plugin ``name``. Imports that plugin's module and nothing else, and that only if allowed."""
    entry = _find(kind, name, allow)
    cls: type[Any] = _import(kind, entry)
    _check(kind, entry, cls)
    return cls


def configure(kind: str, choice: PluginChoice, allow: Allow = None) -> tuple[type[Any], Any]:
    """The class of the chosen plugin and its checked options; raises ``ConfigError`` that says where it was chosen."""
    try:
        cls = load(kind, choice.use, allow)
    except PluginError as error:
        raise type(error)(str(choice.where.error(str(error)))) from error.__cause__
    return cls, build(cls.Options, choice.options, choice.where)


def make(kind: str, choice: PluginChoice, context_factory: Callable[[str], PluginContext], allow: Allow = None) -> Any:
    """An instance of the chosen plugin; ``context_factory`` makes the context for its name."""
    cls, built = configure(kind, choice, allow)
    try:
        return cls(built, context_factory(choice.use))
    except ConfigError as error:
        raise choice.where.error(str(error)) from error.__cause__


def available(kind: str) -> list[PluginInfo]:
    """All installed plugins of a kind. Imports each of them: for people, never on a worker's way."""
    return [_info(kind, entry) for entry in sorted(_installed(kind), key=lambda entry: entry.name)]


def our_own(kind: str) -> list[PluginInfo]:
    """The plugins of a kind that came with dray. Imports each of these, and no other distribution's."""
    entries = [entry for entry in _installed(kind) if _is_ours(entry)]
    return [_info(kind, entry) for entry in sorted(entries, key=lambda entry: entry.name)]


def _info(kind: str, entry: EntryPoint) -> PluginInfo:
    cls, error = None, None
    try:
        cls = load(kind, entry.name)
    except PluginError as problem:
        error = str(problem)
    distribution = entry.dist
    return PluginInfo(
        name=entry.name,
        kind=kind,
        distribution=distribution.name if distribution else "?",
        version=distribution.version if distribution else "?",
        target=entry.value,
        error=error,
        features=getattr(cls, "features", None),
    )


def _find(kind: str, name: str, allow: Allow) -> EntryPoint:
    """The one entry point of this name, from stevedore's cache; the installed metadata decides when that fails.

    The cache does not know distributions, so with an allow list it is not asked.
    """
    if kind not in KINDS:
        raise PluginNotFound(f"no plugins of the kind {kind!r}{suggest(kind, KINDS)}")
    matches = [entry for entry in _cached(kind) if entry.name == name] if allow is None else []
    if len(matches) == 1:
        return matches[0]
    entries = _installed(kind)
    matches = [entry for entry in entries if entry.name == name]
    if len({entry.value for entry in matches}) > 1:
        raise _conflict(kind, name, matches)
    if not matches:
        raise _not_found(kind, name, {entry.name for entry in entries})
    if allow is not None:
        _check_allowed(kind, matches[0], allow)
    return matches[0]


def _check_allowed(kind: str, entry: EntryPoint, allow: Mapping[str, str]) -> None:
    """What comes with dray needs no line in the list: whoever runs dray trusts it already."""
    what, origin = f"the plugin {shown(entry.name)} in dray.{kind}", _distribution(entry)
    if entry.name not in allow:
        if not _is_ours(entry):
            raise PluginRefused(
                f"{what} comes from {origin}, and plugins.allow does not list it; to trust it add there "
                f"{shown(entry.name)}: {origin}"
            )
    elif _canonical(allow[entry.name]) != _canonical(origin):
        raise PluginRefused(
            f"{what} comes from {origin}, and plugins.allow takes it from {shown(allow[entry.name])} only; "
            f"uninstall {origin}, or correct the list"
        )


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "an unknown distribution"


def _is_ours(entry: EntryPoint) -> bool:
    return _canonical(_distribution(entry)) == __name__.partition(".")[0]


def _canonical(name: str) -> str:
    """The name of a distribution as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _cached(kind: str) -> list[EntryPoint]:
    from stevedore.named import NamedExtensionManager

    manager: NamedExtensionManager[Any] = NamedExtensionManager(
        f"dray.{kind}", names=[], on_missing_entrypoints_callback=None
    )
    return list(manager.list_entry_points())


def _installed(kind: str) -> list[EntryPoint]:
    from importlib.metadata import entry_points

    return list(entry_points(group=f"dray.{kind}"))


def _not_found(kind: str, name: str, known: set[str]) -> PluginNotFound:
    extra = f'; try: pip install "dray[{name}]"' if name in _extras(_dray()) else ""
    return PluginNotFound(
        f"no plugin {shown(name)} in dray.{kind}{suggest(name, known)}{extra} (`dray plugins` lists all)"
    )


def _conflict(kind: str, name: str, matches: list[EntryPoint]) -> PluginConflict:
    offers = " and ".join(f"{_distribution(entry)} ({entry.value})" for entry in matches)
    return PluginConflict(
        f"the name {name!r} in dray.{kind} is offered by {offers}; uninstall all but one, or have one renamed"
    )


def _import(kind: str, entry: EntryPoint) -> Any:
    """Import what the entry point names."""
    try:
        return entry.load()
    except Exception as error:
        fresh = next((item for item in _installed(kind) if item.name == entry.name), None)
        if entry.dist is None and fresh is not None and fresh.value != entry.value:
            return _import(kind, fresh)  # stevedore's cache was older than the installed metadata
        driver = _missing_driver(entry, error)
        if driver is not None:
            raise PluginDriverMissing(
                f"the plugin {entry.name!r} needs {driver!r}, which is not installed or too old ({error}); "
                f"run: {_pip_line(fresh or entry, driver)}"
            ) from error
        raise PluginImportFailed(
            f"importing the plugin {entry.name!r} ({entry.value}) failed: {type(error).__name__}: {error}"
        ) from error


def _missing_driver(entry: EntryPoint, error: Exception) -> str | None:
    """The module that could not be imported, if it is neither dray's, nor the plugin's own, nor Python's."""
    if not isinstance(error, ImportError) or not error.name:
        return None
    top = error.name.partition(".")[0]
    own = {entry.module.partition(".")[0], __name__.partition(".")[0]}
    return None if top in own or top in sys.stdlib_module_names else top


def _pip_line(entry: EntryPoint, driver: str) -> str:
    """What installs the driver: the extra of the plugin's distribution if it has one, else the driver itself."""
    distribution = entry.dist
    if distribution is None:
        return f"pip install {driver}"
    extras = _extras(distribution)
    if entry.name in extras:
        return f'pip install "{distribution.name}[{entry.name}]"'
    wanted = re.compile(rf"{re.escape(driver).replace('_', '[-_.]')}\b.*extra\s*==\s*['\"]([^'\"]+)", re.IGNORECASE)
    found = [match[1] for match in map(wanted.match, distribution.requires or ()) if match]
    narrow = sorted(found, key=lambda extra: sum(extra in line for line in distribution.requires or ()))
    return f'pip install "{distribution.name}[{narrow[0]}]"' if narrow else f"pip install {driver}"


def _extras(distribution: Distribution | None) -> list[str]:
    return (distribution.metadata.get_all("Provides-Extra") or []) if distribution else []


def _dray() -> Distribution | None:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        return distribution(__name__.partition(".")[0])
    except PackageNotFoundError:
        return None


def _check(kind: str, entry: EntryPoint, cls: Any) -> None:
    """The class speaks our version of the interface, and implements the kind."""
    what = f"the plugin {entry.name!r} ({entry.value})"
    bases = KINDS[kind]
    names = " or ".join(base.__name__ for base in bases)
    if not isinstance(cls, type):
        raise PluginError(f"{what} is no class; its entry point must name a class that derives from {names}")
    api = getattr(cls, "api", None)
    if api != API_VERSION:
        newer = isinstance(api, int) and api > API_VERSION
        side = "upgrade dray" if newer else "upgrade the plugin"
        stated = (
            "states no version of the plugin interface (`api`)" if api is None else f"speaks plugin interface {api!r}"
        )
        raise PluginIncompatible(f"{what} {stated}, this dray speaks {API_VERSION}; {side}")
    if not issubclass(cls, bases):
        raise PluginError(
            f"{what} does not derive from dray.core.contracts.{names}, so it cannot be used in dray.{kind}"
        )
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise PluginError(f"{what} does not implement {', '.join(missing)} of {names}; report it to its author")
