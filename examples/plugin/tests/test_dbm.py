"""dray's conformance kit over the dbm back end, and what is its own."""

import dbm
from pathlib import Path

import pytest
from dray_dbm import DbmBackend, DbmOptions

from dray import Dray
from dray.core.clock import Clock
from dray.core.errors import Unavailable
from dray.testing import FakeClock, InlineWorker, ResultBackendConformance, plugin_context


class TestDbm(ResultBackendConformance):
    def make(self, clock: Clock) -> DbmBackend:
        return DbmBackend(DbmOptions(), plugin_context("dbm", clock, self.tmp_path))

    def break_store(self) -> None:
        for file in (self.tmp_path / ".dray").iterdir():
            if not file.name.endswith(".lock"):
                file.write_bytes(b"this is no dbm")

    def test_expired_results_leave_the_file(self) -> None:
        backend = DbmBackend(DbmOptions(sweep=60), plugin_context("dbm", self.clock, self.tmp_path))
        backend.store([self.result("old", expires_in_s=10)])
        self.clock.advance(61)
        backend.store([self.result("new")])
        with dbm.open(str(self.tmp_path / ".dray" / "results.dbm")) as file:
            assert list(file.keys()) == [b"new"]


def test_a_file_that_is_no_dbm(tmp_path: Path) -> None:
    (tmp_path / "results.dbm").write_text("hello")
    backend = DbmBackend(DbmOptions(path="results.dbm"), plugin_context("dbm", FakeClock(), tmp_path))
    with pytest.raises(Unavailable, match=r"results\.dbm cannot be reached"):
        backend.open()


def test_it_is_found_by_its_name(tmp_path: Path) -> None:
    app = Dray(config={"transport": "memory", "backend": {"use": "dbm", "path": str(tmp_path / "r.dbm")}})
    assert isinstance(app.backend, DbmBackend)
    app.close()


def test_dray_worker_is_there(dray_worker: InlineWorker) -> None:
    """dray's pytest plugin comes with dray."""
    assert dray_worker.run_until_idle() == 0


@pytest.fixture
def dray_app() -> Dray:
    return Dray(config={})
