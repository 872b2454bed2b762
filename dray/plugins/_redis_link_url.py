"""Where a Redis is: what the URLs and the options say, checked before anything is connected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qsl, unquote

from dray.core.contracts import Seconds, Secret
from dray.core.errors import ConfigError

Kind = Literal["plain", "sentinel", "cluster"]
_SCHEMES: dict[str, Kind] = {
    "redis": "plain",
    "rediss": "plain",
    "unix": "plain",
    "redis+sentinel": "sentinel",
    "redis+cluster": "cluster",
}
_PORTS: dict[Kind, int] = {"plain": 6379, "sentinel": 26379, "cluster": 6379}


@dataclass(frozen=True, slots=True)
class Address:
    """One place to connect to: a host and port, or the path of a Unix socket."""

    host: str
    port: int
    path: str = ""
    tls: bool = False

    def __str__(self) -> str:
        return self.path or (f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}")


@dataclass(frozen=True, slots=True)
class Target:
    """What the URLs mean together."""

    kind: Kind
    addresses: tuple[Address, ...]
    """Where to try, in this order; for ``sentinel`` the Sentinels."""
    master: str = ""
    database: int = 0
    username: str = ""
    password: str = ""


@dataclass(frozen=True, slots=True)
class RedisOptions:
    """How to reach Redis. What the transport and the result back end have in common."""

    url: str | tuple[str, ...] = "redis://localhost:6379/0"
    """``redis://[user:password@]host[:6379][/database]``, ``rediss://...`` (TLS), ``unix:///path/to.sock[?db=1]``,
    ``redis+sentinel://host[:26379],host.../master-name[/database]``, ``redis+cluster://host[:6379],host...``. A list of
    ``redis``, ``rediss`` and ``unix`` URLs: the first that is a writable master is used."""
    prefix: str = "dray"
    """What the names of all keys and channels begin with."""
    username: str | None = None
    """Instead of in the URL."""
    password: Secret | None = None
    """Instead of in the URL, where it may stand as well (percent-encoded)."""
    sentinel_username: str | None = None
    """For the Sentinels themselves, if they ask for one."""
    sentinel_password: Secret | None = None
    """For the Sentinels themselves, if they ask for one."""
    connect_timeout: Seconds = 5.0
    """For one address: connecting, TLS, logging in."""
    timeout: Seconds = 5.0
    """How long to wait for an answer before the outcome counts as unknown."""
    heartbeat: Seconds = 10.0
    """A connection that was idle this long is tried before it is used; a silent peer is noticed within two."""
    tls: bool = False
    """Speak TLS to Sentinels and to a cluster (a single server: write ``rediss://``)."""
    tls_ca: str | None = None
    """File with the certificates to trust instead of the system's; relative to the configuration's folder."""
    tls_cert: str | None = None
    """File with our own certificate, if the server asks for one."""
    tls_key: str | None = None
    """File with the key of ``tls_cert``, if it is not in there."""
    tls_verify: Literal["full", "no-hostname", "none"] = "full"
    """``no-hostname``: any name in a trusted certificate will do. ``none``: any certificate at all, so that whoever is
    in between can read and change everything; for trying out only."""

    def __post_init__(self) -> None:
        target_of(self)
        if not self.prefix or not self.prefix.isprintable() or len(self.prefix) > 100 or set(self.prefix) & set("{} "):
            raise ConfigError(
                f"prefix: {self.prefix!r} must be 1 to 100 printable characters without braces and spaces"
            )
        if self.tls_key and not self.tls_cert:
            raise ConfigError("tls_key: a key is of no use without tls_cert")
        for name in ("connect_timeout", "timeout", "heartbeat"):
            if getattr(self, name) < 0.01:
                raise ConfigError(f"{name}: {getattr(self, name):g} s is too short, the least is 10ms")


def target_of(options: RedisOptions) -> Target:
    """What the options' URLs mean; raises ``ConfigError``, which never quotes a password."""
    urls = (options.url,) if isinstance(options.url, str) else options.url
    if not urls:
        raise ConfigError("url: the list is empty")
    targets = [_parse(url, options.tls) for url in urls]
    first = targets[0]
    if len(targets) > 1:
        if any(target.kind != "plain" for target in targets):
            raise ConfigError(
                "url: a list is for redis, rediss and unix; write redis+sentinel://h1,h2/master as one URL"
            )
        if len({(target.database, target.username, target.password) for target in targets}) > 1:
            raise ConfigError("url: all in the list must have the same database, user and password")
    return Target(
        first.kind,
        tuple(address for target in targets for address in target.addresses),
        first.master,
        first.database,
        options.username if options.username is not None else first.username,
        options.password if options.password is not None else first.password,
    )


def _parse(url: str, tls: bool) -> Target:
    """One URL."""
    scheme, separator, rest = url.partition("://")
    kind = _SCHEMES.get(scheme.lower())
    if not separator or kind is None:
        raise ConfigError(f"url: write {', '.join(_SCHEMES)} and then ://; got the scheme {scheme[:20]!r}")
    rest, _, query = rest.partition("?")
    authority, _, path = rest.partition("/")
    user_info, _, hosts = authority.rpartition("@")
    username, _, password = user_info.partition(":")
    parameters = dict(parse_qsl(query, keep_blank_values=True))
    database = parameters.pop("db", "")
    if parameters:
        raise ConfigError(f"url: unknown parameter {next(iter(parameters))!r}; options go beside the URL, not in it")
    master = ""
    if scheme.lower() == "unix":
        addresses: tuple[Address, ...] = (Address("localhost", 0, unquote("/" + path)),)
        if hosts or not path:
            raise ConfigError("url: a Unix socket is written unix:///path/to.sock")
    else:
        is_tls = tls or scheme.lower() == "rediss"
        addresses = tuple(_address(host, kind, is_tls) for host in hosts.split(",") if host)
        first, _, second = path.partition("/")
        if kind == "sentinel":
            master, first = unquote(first), second
        database = database or first
    _check(kind, addresses, master, database)
    return Target(kind, addresses, master, int(database or 0), unquote(username), unquote(password))


def _address(text: str, kind: Kind, tls: bool) -> Address:
    """``host``, ``host:port``, ``[::1]:port``."""
    host, port = text, ""
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        port = port.removeprefix(":")
    elif ":" in text:
        host, _, port = text.rpartition(":")
    if not host or (port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536)):
        raise ConfigError(f"url: {text!r} is no host:port with a port from 1 to 65535")
    return Address(unquote(host), int(port or _PORTS[kind]), tls=tls)


def _check(kind: Kind, addresses: tuple[Address, ...], master: str, database: str) -> None:
    """What cannot be meant."""
    if not addresses:
        raise ConfigError("url: no host in it")
    if len(addresses) > 1 and kind == "plain":
        raise ConfigError("url: several hosts are written as a list of URLs, or with redis+sentinel or redis+cluster")
    if kind == "sentinel" and not master:
        raise ConfigError("url: redis+sentinel://host:26379,.../master-name: the name of the master is missing")
    if database and not (database.isascii() and database.isdigit()):
        raise ConfigError(f"url: the database is a number, as in redis://host:6379/0; got {database[:20]!r}")
    if kind == "cluster" and int(database or 0):
        raise ConfigError("url: a cluster has database 0 only")
