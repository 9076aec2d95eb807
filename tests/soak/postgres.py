"""A PostgreSQL of our own that can be stopped without warning and started again.

Unlike the one the tests share (``tests/servers.py``) it is durable: fsync is on. It runs as a
child of this process and ends with it, whatever happens.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import servers
from tests.keeper import die_with_parent


class PostgresMissing(Exception):  # noqa: N818
    """There is no PostgreSQL on this machine."""


@dataclass
class Cluster:
    """A data directory and the server on it."""

    folder: Path
    programs: Path
    port: int
    prefix: Sequence[str] = ()  # e.g. taskset, to pin it to a core
    identity: dict[str, Any] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql://farebox@127.0.0.1:{self.port}/postgres"

    def spawn(self) -> None:
        """Start the server without waiting for it."""
        settings = ["max_connections=100", "listen_addresses=127.0.0.1", f"port={self.port}"]
        settings += ["shared_buffers=128MB", f"unix_socket_directories={self.folder / 'run'}"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *self.prefix,
                    *(str(self.programs / "postgres"), "-D", str(self.folder / "data")),
                    *(part for one in settings for part in ("-c", one)),
                ],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509  (touches no lock) runs after the user was changed, which would clear it
                **self.identity,
            )

    def ready(self) -> bool:
        """Whether it answers a query."""
        return servers.port_open(self.port) and servers._answers(self.url)

    def start(self) -> None:
        self.spawn()
        servers.until(self.ready, 60, "PostgreSQL", lambda: self._running)

    @property
    def _running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop_immediately(self) -> None:
        """``pg_ctl -m immediate stop``: no checkpoint, no goodbye; the next start recovers."""
        if self.process is None:
            return
        subprocess.run(
            [
                *(str(self.programs / "pg_ctl"), "-D", str(self.folder / "data")),
                *("-m", "immediate", "stop"),
            ],
            cwd=self.folder,
            capture_output=True,
            check=True,
            timeout=60,
            **self.identity,
        )
        self.process.wait(30)

    def remove(self) -> None:
        if self.process is not None and self._running:
            self.process.send_signal(signal.SIGQUIT)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def cluster(prefix: Sequence[str] = (), parent: Path | None = None) -> Iterator[Cluster]:
    """A fresh one, running, for the length of a ``with`` block. Raises ``PostgresMissing``.

    ``parent``: where its files are to lie, if not in the system's folder for temporary ones.
    """
    found = servers.postgres_bin()
    if found is None:
        raise PostgresMissing("PostgreSQL is missing: install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="farebox-postgres-", dir=parent))
    made = Cluster(folder, found, servers.free_port(), prefix)
    try:
        _initialise(made)
        made.start()
        yield made
    finally:
        made.remove()


def _initialise(made: Cluster) -> None:
    folder, user = made.folder, servers._postgres_user()
    made.programs = servers._readable_by(made.programs, user, folder)
    folder.chmod(0o711)
    (folder / "data").mkdir(mode=0o700)
    (folder / "run").mkdir(mode=0o700)
    if user is not None:
        entry = pwd.getpwnam(user)
        made.identity = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        for path in (folder / "data", folder / "run"):
            os.chown(path, entry.pw_uid, entry.pw_gid)
    subprocess.run(
        [
            *(str(made.programs / "initdb"), "-D", str(folder / "data"), "-U", "farebox"),
            *("-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions"),
        ],
        cwd=folder,
        capture_output=True,
        check=True,
        timeout=120,
        **made.identity,
    )
