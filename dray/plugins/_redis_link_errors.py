"""What Redis refuses, in dray's words: each error names the setting to look at."""

from __future__ import annotations

import hiredis

from dray.core.errors import TransportError, Unavailable, Uncertain

_ADVICE = (
    ("WRONGPASS", "the password or user name is wrong: check `password` and `username` (or those in `url`)"),
    ("NOAUTH", "it asks for a password: set `password`, or write redis://:password@host"),
    ("ERR invalid password", "the password is wrong: check `password` (or the one in `url`)"),
    ("ERR AUTH", "it has no password, and one was given: take `password` out of the options and the `url`"),
    ("ERR Client sent AUTH", "it has no password, and one was given: take `password` out of the options and the `url`"),
    ("NOPERM", "the user may not do this: give `username` +@all on the keys and channels that begin with `prefix`"),
    ("ERR DB index", "the database in `url` does not exist: take a number below the server's `databases` setting (16)"),
    ("ERR SELECT is not allowed", "it is a cluster: write `url` as redis+cluster://, without a database"),
    ("ERR Cluster support disabled", "it is no cluster: write `url` as redis:// instead of redis+cluster://"),
    ("ERR This instance has cluster support disabled", "it is no cluster: write `url` as redis:// instead"),
    ("READONLY", "it is a replica, which takes no writes: point `url` at the master, or use redis+sentinel://"),
    ("MASTERDOWN", "it is a replica that lost its master: point `url` at the master, or use redis+sentinel://"),
    ("LOADING", "it is still loading its data after a start: wait, or list another server in `url`"),
    ("OOM", "its `maxmemory` is used up: raise it, remove keys, or let results expire sooner"),
    ("MISCONF", "it cannot save to disk and therefore takes no writes: see its log, its disk and its `dir` setting"),
    ("NOREPLICAS", "too few replicas are connected for its `min-replicas-to-write`"),
    ("CLUSTERDOWN", "the cluster has slots that no node serves: see CLUSTER INFO, and wait for the failover"),
    ("MOVED", "it is a node of a cluster: write `url` as redis+cluster://"),
    ("ASK", "it is a node of a cluster: write `url` as redis+cluster://"),
    ("CROSSSLOT", "it is a node of a cluster: write `url` as redis+cluster://"),
    ("TRYAGAIN", "a slot of the cluster is being moved and not whole yet: try again"),
    ("WRONGTYPE", "a key under our `prefix` was made by something else: choose another `prefix`, or delete that key"),
    ("NOSCRIPT", "the script was dropped between two calls: try again"),
    ("BUSY", "a script of somebody runs for too long in it: see SCRIPT KILL"),
    ("DENIED", "it is in protected mode: give it a password or set its `bind`"),
    ("ERR max number of clients", "its `maxclients` is used up: raise it, or run fewer processes"),
    ("ERR unknown command", "it is older than 7.0, has renamed the command, or is no Redis: use Redis 7.0 or Valkey"),
    ("ERR No such master", "the Sentinels watch no master of this name: check the one in `url`"),
    ("IDONTKNOW", "the Sentinel does not know: it has just started"),
)


def code_of(error: object) -> str:
    """The first word of an error reply: ``READONLY``, ``ERR``."""
    return str(error).partition(" ")[0]


def refused(error: hiredis.ReplyError, where: object, doing: str = "") -> TransportError:
    """An error reply as what dray raises: a refused command certainly did nothing, a script that failed may have."""
    text = str(error).partition(", with args")[0][:300]  # the arguments are nobody's business in a log
    advice = next((f"{words}: " for start, words in _ADVICE if text.startswith(start)), "")
    kind = Uncertain if " script: " in text else Unavailable
    mapped = kind(f"redis at {where}{doing}: {advice}{text}")
    mapped.__cause__ = error
    return mapped
