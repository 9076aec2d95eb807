"""Runs one server for the length of a test run, and takes it down whatever happens.

    python tests/keeper.py RUN_PID DIR [--user NAME] -- COMMAND…

The server is started in DIR (made beforehand, removed here) and gets SIGKILL when this keeper
dies. The keeper ends when the process RUN_PID (the test run) has ended, however it ended, or when
it gets SIGTERM. Only the standard library: it may run under another Python than the tests.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """In a child before exec: SIGKILL when the parent is gone (Linux; elsewhere no effect)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _until_gone(pid: int, server: subprocess.Popen[bytes]) -> None:
    """Return when the process ``pid`` or the server has ended."""
    try:
        watched = [os.pidfd_open(pid), os.pidfd_open(server.pid)]
    except ProcessLookupError:
        return
    except (AttributeError, OSError):  # no pidfd on this system: look every half second
        while server.poll() is None:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.5)
        return
    select.select(watched, [], [])


def main() -> int:
    run_pid, folder = int(sys.argv[1]), Path(sys.argv[2])
    split = sys.argv.index("--")
    user = sys.argv[4] if sys.argv[3:4] == ["--user"] else None
    identity: dict[str, object] = {}
    if user is not None:
        entry = pwd.getpwnam(user)
        identity = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}

    def stop(_signal: int, _frame: object) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the test run; it ends us after
    with (folder / "log").open("ab") as log:
        server = subprocess.Popen(
            sys.argv[split + 1 :],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509  (one thread) runs after the user was changed, which would clear it
            **identity,  # type: ignore[call-overload]  # checked by the few keys above
        )
    try:
        _until_gone(run_pid, server)
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGQUIT)  # PostgreSQL: stop at once; Redis: likewise
            try:
                server.wait(5)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
        shutil.rmtree(folder, ignore_errors=True)
        if not Path(f"/proc/{run_pid}").exists() and Path("/proc/self").exists():
            # The run was killed, so nobody else is left to remove what it shared.
            shutil.rmtree(os.environ["TEST_RUN_DIR"], ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
