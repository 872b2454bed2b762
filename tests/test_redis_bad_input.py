"""Redis wrongly addressed or wrongly set up: each error names the setting to change, whoever meets it first."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hiredis
import pytest

from dray.core.contracts import Durability
from dray.core.errors import ConfigError, Unavailable, Uncertain
from dray.core.message import State, StoredResult
from dray.core.options import build
from dray.plugins._redis import RedisOptions, refused
from dray.plugins._redis_link_server import server_of
from dray.plugins._redis_link_url import target_of
from dray.plugins.backends.redis import RedisBackend
from dray.testing import plugin_context
from tests.servers import HOST, Certificates, RedisServer
from tests.servers_process import until

PASSWORD = "p@ss:word/%"


def opened(url: str, **options: Any) -> RedisBackend:
    with opening(url, **options) as backend:
        backend.fetch(["r"])
    return backend


@contextmanager
def opening(url: str, **options: Any) -> Iterator[RedisBackend]:
    backend = RedisBackend(RedisBackend.Options(url=url, **options), plugin_context("redis"))
    try:
        backend.open()
        yield backend
    finally:
        backend.close()


@pytest.fixture(scope="module")
def plain() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def locked() -> Iterator[RedisServer]:
    with RedisServer(requirepass=PASSWORD) as server:
        yield server


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates.make(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def secure(certificates: Certificates) -> Iterator[RedisServer]:
    with RedisServer(tls=certificates) as server:
        yield server


# --- passwords ---------------------------------------------------------------------------------------------


def test_the_right_password_is_taken_from_the_url_or_beside_it(locked: RedisServer) -> None:
    opened(locked.url())
    opened(f"redis://{HOST}:{locked.port}", password=PASSWORD)
    opened(f"redis://{HOST}:{locked.port}", username="default", password=PASSWORD)


@pytest.mark.parametrize(
    ("user_info", "message"),
    [
        (":wrong@", r"check `password` and `username`"),
        ("nobody:wrong@", r"check `password` and `username`"),
        ("", r"set `password`"),
    ],
)
def test_a_wrong_password(locked: RedisServer, user_info: str, message: str) -> None:
    with pytest.raises(Unavailable, match=message) as raised:
        opened(f"redis://{user_info}{HOST}:{locked.port}")
    assert "wrong@" not in str(raised.value)
    assert str(locked.port) in str(raised.value)


def test_a_password_where_there_is_none(plain: RedisServer) -> None:
    with pytest.raises(Unavailable, match="take `password` out"):
        opened(f"redis://:secret@{HOST}:{plain.port}")


def test_a_user_without_rights(plain: RedisServer) -> None:
    plain.command("ACL", "SETUSER", "weak", "on", ">secret", "+@all", "-eval", "-evalsha", "~*", "&*")
    with (
        opening(f"redis://weak:secret@{HOST}:{plain.port}") as backend,
        pytest.raises(Unavailable, match="give `username`"),
    ):
        backend.arrive("g", "m", 2)


def test_a_user_who_may_only_do_what_is_needed(plain: RedisServer) -> None:
    """No INFO, no CONFIG, no ROLE, no CLIENT: all that is lost is what the probe would have said."""
    rights = ["resetkeys", "~mine:*", "resetchannels", "&mine:*", "-@all", "+eval", "+evalsha", "+set", "+get"]
    rights += ["+getrange", "+mget", "+unlink", "+hsetnx", "+hlen", "+hset", "+hget", "+pexpire", "+publish"]
    plain.command("ACL", "SETUSER", "lean", "on", ">secret", *rights, "+subscribe", "+ping")
    with opening(f"redis://lean:secret@{HOST}:{plain.port}", prefix="mine") as backend:
        backend.store([StoredResult("r", State.SUCCESS, b"x", None)])
        assert set(backend.wait(["r"], 5)) == {"r"}
        backend.delete(["r"])
        assert backend.arrive("g", "m", 1)


# --- ports and TLS -----------------------------------------------------------------------------------------


def test_a_wrong_port() -> None:
    with pytest.raises(Unavailable, match="check that the server runs, and host and port in `url`"):
        opened(f"redis://{HOST}:1")


def test_a_host_that_does_not_exist() -> None:
    with pytest.raises(Unavailable, match="host and port in `url`"):
        opened("redis://no-such-host.invalid:6379")


@contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """A server of something else, which says the same to everybody."""
    with socket.create_server((HOST, 0)) as listening:

        def serve() -> None:
            try:
                while True:
                    with listening.accept()[0] as opened:
                        opened.recv(1000)
                        opened.sendall(answer)
            except OSError:
                return

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"*1\r\n*1\r\n*0\r\n", b"\x15\x03\x01\x00\x02"]
)
def test_a_port_of_something_else(answer: bytes) -> None:
    with answering(answer) as port, pytest.raises(Unavailable, match="is it Redis"):
        opened(f"redis://{HOST}:{port}", connect_timeout=1.0)


def test_tls_works_with_the_authority_named(secure: RedisServer, certificates: Certificates) -> None:
    opened(secure.url(), tls_ca=str(certificates.authority))
    opened(f"rediss://localhost:{secure.port}", tls_ca=str(certificates.authority))


def test_tls_spoken_to_a_plain_port(plain: RedisServer) -> None:
    with pytest.raises(Unavailable, match="write `url` with redis://"):
        opened(f"rediss://{HOST}:{plain.port}")


def test_plain_text_spoken_to_a_tls_port(secure: RedisServer) -> None:
    with pytest.raises(Unavailable, match="write `url` with rediss://"):
        opened(f"redis://{HOST}:{secure.port}")


def test_a_certificate_that_nobody_vouches_for(secure: RedisServer) -> None:
    with pytest.raises(Unavailable, match="set `tls_ca`"):
        opened(secure.url())
    with pytest.raises(Unavailable, match="set `tls_ca`"):
        opened(secure.url(), tls_verify="no-hostname")
    opened(secure.url(), tls_verify="none")


def test_a_certificate_of_another_host(certificates: Certificates) -> None:
    with RedisServer(tls=certificates, bind=f"{HOST} 127.0.0.2") as server:
        url, authority = f"rediss://127.0.0.2:{server.port}", str(certificates.authority)
        with pytest.raises(Unavailable, match="the host name in `url`"):
            opened(url, tls_ca=authority)
        opened(url, tls_ca=authority, tls_verify="no-hostname")


def test_a_server_that_asks_for_a_certificate(certificates: Certificates) -> None:
    with RedisServer(tls=certificates) as server:
        server.command("CONFIG", "SET", "tls-auth-clients", "yes")
        authority = str(certificates.authority)
        with pytest.raises(Unavailable, match="`tls_cert`"):
            opened(server.url(), tls_ca=authority)
        opened(server.url(), tls_ca=authority, tls_cert=str(certificates.certificate), tls_key=str(certificates.key))


def test_certificate_files_that_cannot_be_read(secure: RedisServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tls_ca"):
        opened(secure.url(), tls_ca=str(tmp_path / "nothing.pem"))


# --- the server --------------------------------------------------------------------------------------------


def test_a_database_that_does_not_exist(plain: RedisServer) -> None:
    opened(plain.url(15))
    with pytest.raises(Unavailable, match="`databases`"):
        opened(plain.url(16))


def test_a_replica(plain: RedisServer) -> None:
    with (
        RedisServer(replicaof=(HOST, plain.port)) as replica,
        pytest.raises(Unavailable, match=r"point `url` at the master, or use redis\+sentinel://"),
    ):
        opened(replica.url())


def test_too_many_clients() -> None:
    with RedisServer(maxclients=1) as server, opening(server.url()) as backend:
        backend.fetch(["r"])
        with pytest.raises(Unavailable, match="`maxclients`"):
            opened(server.url())


def test_memory_that_is_used_up() -> None:
    with (
        RedisServer(maxmemory="1mb") as server,
        opening(server.url()) as backend,
        pytest.raises(Unavailable, match="`maxmemory`"),
    ):
        backend.store([StoredResult("r", State.SUCCESS, b"x" * 2**20, None)])


def test_a_disk_that_cannot_be_written() -> None:
    with RedisServer(save="3600 1") as server, opening(server.url()) as backend:
        (server.folder / "dump.rdb").mkdir()
        server.command("SET", "key", "value")
        server.command("BGSAVE")
        until(lambda: server.command("INFO")["rdb_last_bgsave_status"] == "err", "the snapshot has failed")
        with pytest.raises(Unavailable, match="`dir` setting"):
            backend.store([StoredResult("r", State.SUCCESS, b"x", None)])


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_server_that_throws_results_away_is_named(policy: str, caplog: pytest.LogCaptureFixture) -> None:
    with RedisServer(maxmemory_policy=policy) as server, caplog.at_level(logging.WARNING):
        opened(server.url())
    assert f"maxmemory-policy is {policy}" in caplog.text


def test_an_old_redis() -> None:
    """A stand-in for its answer: no old server can be had."""
    fields = {"redis_version": "6.2.14", "role": "master"}
    with pytest.raises(Unavailable, match=r"redis 6\.2\.14; dray needs Redis 7\.0"):
        server_of(fields, "everysec", HOST)
    valkey = {"redis_version": "7.2.4", "server_name": "valkey", "valkey_version": "8.1.1"}
    assert server_of(valkey, "", HOST).text == "valkey 8.1.1"


@pytest.mark.parametrize(
    ("aof", "fsync", "durability"),
    [
        ("0", "always", Durability.D1),
        ("1", "everysec", Durability.D1),
        ("1", "", Durability.D1),
        ("1", "no", Durability.D2),
        ("1", "always", Durability.D3),
    ],
)
def test_what_a_crash_may_cost(aof: str, fsync: str, durability: Durability) -> None:
    server = server_of({"redis_version": "7.0.15", "aof_enabled": aof}, fsync, HOST)
    assert server.durability == durability
    assert server.window


def test_a_key_of_somebody_else(plain: RedisServer, redis_prefix: str) -> None:
    plain.command("LPUSH", f"{redis_prefix}:r:list", "theirs")
    plain.command("SET", f"{redis_prefix}:r:text", "theirs, and no result of ours")
    plain.command("SET", f"{redis_prefix}:b:g", "theirs")
    with opening(plain.url(), prefix=redis_prefix) as backend:
        assert backend.fetch(["list", "text"]) == {}
        for call in (
            lambda: backend.store([StoredResult("list", State.SUCCESS, b"x", None)]),
            lambda: backend.wait(["list"], 0.05),
            lambda: backend.arrive("g", "m", 2),
        ):
            with pytest.raises(Uncertain, match="choose another `prefix`"):  # a script that had begun
                call()


@pytest.mark.parametrize(
    ("answer", "setting"),
    [
        ("LOADING Redis is loading the dataset in memory", "list another server in `url`"),
        ("MASTERDOWN Link with MASTER is down", "point `url` at the master"),
        ("NOREPLICAS Not enough good replicas to write.", "`min-replicas-to-write`"),
        ("CLUSTERDOWN Hash slot not served", "CLUSTER INFO"),
        ("CROSSSLOT Keys in request don't hash to the same slot", r"redis\+cluster://"),
        ("BUSY Redis is busy running a script.", "SCRIPT KILL"),
        ("DENIED Redis is running in protected mode", "password"),
    ],
)
def test_what_is_hard_to_bring_about(answer: str, setting: str) -> None:
    error = refused(hiredis.ReplyError(answer), f"{HOST}:6379")
    with pytest.raises(Unavailable, match=setting):
        raise error
    assert answer in str(error)


# --- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"url": "http://h"}, "the scheme 'http'"),
        ({"url": "localhost:6379"}, "://"),
        ({"url": "redis://"}, "no host"),
        ({"url": "redis://h:port"}, "port from 1 to 65535"),
        ({"url": "redis://h:70000"}, "port from 1 to 65535"),
        ({"url": "redis://h/first"}, "the database is a number"),
        ({"url": "redis://h?timeout=3"}, "options go beside the URL"),
        ({"url": "redis://a,b"}, "a list of URLs"),
        ({"url": "redis+sentinel://h"}, "name of the master is missing"),
        ({"url": "redis+cluster://h/3"}, "database 0 only"),
        ({"url": "unix://"}, "unix:///path/to.sock"),
        ({"url": []}, "the list is empty"),
        ({"url": ["redis://a/1", "redis://b/2"]}, "same database"),
        ({"url": ["redis://a", "redis+cluster://b"]}, "one URL"),
        ({"prefix": ""}, "prefix"),
        ({"prefix": "a{b}"}, "prefix"),
        ({"timeout": 0}, "timeout"),
        ({"tls_key": "key.pem"}, "tls_cert"),
        ({"tls_verify": "maybe"}, "tls_verify"),
        ({"pasword": "x"}, "did you mean 'password'"),
    ],
)
def test_options_that_cannot_be_meant(raw: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(RedisBackend.Options, raw)


def test_urls_in_all_their_forms() -> None:
    def meant(**raw: object) -> tuple[object, ...]:
        target = target_of(build(RedisOptions, raw))
        places = [str(address) for address in target.addresses]
        return target.kind, places, target.master, target.database, target.username, target.password

    assert meant() == ("plain", ["localhost:6379"], "", 0, "", "")
    assert meant(url="redis://u:p%40%2F@h:1/2") == ("plain", ["h:1"], "", 2, "u", "p@/")
    assert meant(url="redis://h?db=3")[3] == 3
    assert meant(url="redis://[::1]:7/1")[1] == ["[::1]:7"]
    assert meant(url="unix://:p@/run/r.sock?db=1") == ("plain", ["/run/r.sock"], "", 1, "", "p")
    assert meant(url=["redis://a", "rediss://b:2"])[1] == ["a:6379", "b:2"]
    assert meant(url="redis+sentinel://u:p@a,b:2/m/4") == ("sentinel", ["a:26379", "b:2"], "m", 4, "u", "p")
    assert meant(url="redis+cluster://a,b:2")[:2] == ("cluster", ["a:6379", "b:2"])
    assert meant(url="redis://u:p@h", username="other", password="q")[4:] == ("other", "q")
    tls = target_of(build(RedisOptions, {"url": "redis+cluster://a", "tls": True}))
    assert tls.addresses[0].tls


def test_a_password_is_never_shown() -> None:
    options = build(RedisOptions, {"url": "redis://h", "password": "hush", "sentinel_password": "hush"})
    assert "hush" not in repr(options)
    for url in ("redis://u:hush@h:port", "redis://u:hush@h/word", "hush://u:hush@h", "redis://u:hush@h?a=hush"):
        with pytest.raises(ConfigError) as raised:
            build(RedisOptions, {"url": url})
        assert "hush@" not in str(raised.value)
