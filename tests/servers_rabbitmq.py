"""A private RabbitMQ server."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tests.servers_console import Console
from tests.servers_process import HOST, Programs, ServerProcess, connection, free_ports
from tests.servers_server import Server

if TYPE_CHECKING:
    from tests.servers_tls import Certificates

PROGRAMS = Programs(Path(os.environ.get("DRAY_TEST_RABBITMQ_ROOT", "/")))
CONSOLE_SOURCE = Path(__file__).with_name("servers_console.erl")


class RabbitMQServer(Server):
    """A RabbitMQ of one's own, on a free loopback port, its data in a temporary folder.

    Settings are those of the application ``rabbit``: numbers and booleans, or text as an Erlang term:
    ``RabbitMQServer(consumer_timeout=5000, cluster_partition_handling="pause_minority")``. ``tls`` adds a listener
    (``tls_url``). ``schedulers`` are the cores that Erlang uses. What is changed in ``settings`` holds from the next
    start.
    """

    start_timeout_s = 100.0  # seven where the machine has nothing else to do

    def __init__(
        self,
        *,
        tls: Certificates | None = None,
        schedulers: int = 1,
        epmd: Epmd | None = None,
        owner: int = 0,
        **settings: Any,
    ) -> None:
        program = PROGRAMS.find("rabbitmq-server")
        self.folder = PROGRAMS.folder("rabbitmq")
        self.port, self.tls_port, self.distribution_port, console_port = free_ports(4)
        self.console = Console(console_port)
        self.node = f"dray{self.port}@localhost"
        self.epmd = epmd or Epmd(owner)
        self._owns_epmd = epmd is None
        self.settings: dict[str, Any] = {"tcp_listeners": f'[{{"{HOST}", {self.port}}}]', **settings}
        if tls:
            self._use_tls(tls)
        self._write_files()
        env = self._environment(schedulers)
        self._process = ServerProcess(PROGRAMS.command(program), self.folder, env, owner)

    def _write_files(self) -> None:
        (self.folder / "enabled_plugins").write_text("[].\n")
        shutil.copy(CONSOLE_SOURCE, self.folder / "console.erl")
        secret = self.folder / ".erlang.cookie"
        secret.write_text("dray")
        secret.chmod(0o400)  # as Erlang wants it

    def _use_tls(self, tls: Certificates) -> None:
        copied = tls.copy_to(self.folder)
        files = {"cacertfile": copied.authority, "certfile": copied.certificate, "keyfile": copied.key}
        paths = ", ".join(f'{{{name}, "{PROGRAMS.inside(path)}"}}' for name, path in files.items())
        self.settings["ssl_listeners"] = f'[{{"{HOST}", {self.tls_port}}}]'
        self.settings["ssl_options"] = f"[{paths}, {{verify, verify_none}}]"

    def _write_settings(self) -> None:
        terms = ", ".join(f"{{{name}, {term(value)}}}" for name, value in self.settings.items())
        (self.folder / "advanced.config").write_text(f"[{{rabbit, [{terms}]}}].\n")

    def _environment(self, schedulers: int) -> dict[str, str]:
        here = PROGRAMS.inside(self.folder)
        return {
            "HOME": here,
            "RABBITMQ_MNESIA_BASE": f"{here}/data",
            "RABBITMQ_LOG_BASE": f"{here}/log",
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_DIST_PORT": str(self.distribution_port),
            "RABBITMQ_CONF_ENV_FILE": f"{here}/none.env",
            "RABBITMQ_CONFIG_FILE": f"{here}/none",
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{here}/advanced.config",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{here}/enabled_plugins",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                f"-kernel inet_dist_use_interface {{127,0,0,1}} +S {schedulers}:{schedulers}"
                " +sbwt none +sbwtdcpu none +sbwtdio none"  # no busy waiting: a fifth of the processor time of a start
                f" -run file eval {here}/console.erl"
            ),
            "ERL_EPMD_PORT": str(self.epmd.port),
            "ERL_EPMD_ADDRESS": HOST,
            "CONSOLE_PORT": str(self.console.port),
        }

    def url(self, vhost: str = "/", user: str = "guest", password: str = "guest") -> str:
        return f"amqp://{user}:{password}@{HOST}:{self.port}/{quote(vhost, safe='')}"

    def tls_url(self, vhost: str = "/", user: str = "guest", password: str = "guest") -> str:
        return f"amqps://{user}:{password}@localhost:{self.tls_port}/{quote(vhost, safe='')}"

    def add_vhost(self, name: str = "") -> str:
        """A virtual host in which the user guest may do anything; it gets a name of its own where none is given."""
        return self.console.add_vhost(name)

    def delete_vhost(self, name: str) -> None:
        self.console.delete_vhost(name)

    def eval(self, expressions: str) -> str:
        """The value of Erlang expressions that run in the server, as Erlang writes it."""
        return self.console.eval(expressions)

    def sync(self) -> None:
        """Put on disk what a quorum queue is recovered from, which is else done half a second after its declaration.

        A queue that a SIGKILL hits before that stays without a leader for good (seen on 3.10.8).
        """
        self.eval("[dets:sync(Table) || Table <- dets:all()]")

    def version(self) -> tuple[int, ...]:
        return self.console.version()

    def launch(self) -> None:
        self._write_settings()
        self.epmd.start()
        super().launch()

    def leave(self) -> None:
        super().leave()
        self.epmd.leave()

    def close(self) -> None:
        super().close()
        if self._owns_epmd:
            self.epmd.close()

    def _answers(self) -> bool:
        try:  # the console opens when the boot is complete
            return self.console.eval("rabbit:is_running()", 5) == "true"
        except OSError:
            return False


class Epmd(Server):
    """Erlang's name server, in the foreground: the daemon that RabbitMQ starts by itself outlives everybody."""

    def __init__(self, owner: int = 0) -> None:
        program = PROGRAMS.find("epmd")
        self.folder = PROGRAMS.folder("epmd")
        (self.port,) = free_ports(1)
        command = PROGRAMS.command(program, "-port", str(self.port), "-address", HOST)
        self._process = ServerProcess(command, self.folder, owner=owner)

    def launch(self) -> None:
        if not self.running:  # several nodes may share it
            super().launch()

    def _answers(self) -> bool:
        try:
            with connection(self.port, 1):
                return True
        except OSError:
            return False


def term(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
