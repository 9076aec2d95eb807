"""The anvil binary as a child process that never outlives us.

The binary is started itself, not through its Node wrapper: one process, clean signals. On Linux
the kernel kills it when we die in whatever way (``PR_SET_PDEATHSIG``); elsewhere it is stopped on
a normal end and on the signals that ``devnet.run`` handles.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

START_S: Final = 15
STOP_S: Final = 3

# Runs between fork and exec in an interpreter of its own: ``preexec_fn`` would run Python code in
# a copy of a process whose other threads may hold any lock. If the parent died before prctl took
# effect, its pid is no longer ours and nobody would ever kill us: leave at once.
_EXEC_TIED: Final = """
import ctypes, os, signal, sys
if ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0):
    sys.exit("prctl failed")
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class DevnetError(Exception):
    """The local chain could not be started. The text is one line, meant for a person."""


@dataclass(frozen=True, slots=True)
class AnvilProcess:
    """A running anvil: the child, the folder of its files, and where it listens."""

    child: subprocess.Popen[bytes]
    folder: Path
    log: IO[bytes]

    @property
    def config(self) -> Path:
        """The JSON file in which anvil tells its accounts and keys."""
        return self.folder / "config.json"

    def forget_files(self) -> None:
        """Remove the folder. Anvil keeps writing to a file that has no name any more."""
        shutil.rmtree(self.folder, ignore_errors=True)


def find_binary(node_modules: Path) -> Path:
    """The anvil that npm put there for this machine, else one on the PATH. ``DevnetError``."""
    cpu = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
    target = f"{sys.platform}-{cpu.get(platform.machine().lower(), platform.machine())}"
    bundled = node_modules / "@foundry-rs" / f"anvil-{target}" / "bin" / "anvil"
    if bundled.is_file():
        return bundled
    installed = shutil.which("anvil")
    if installed is not None:
        return Path(installed)
    raise DevnetError(f"anvil for {target} is not installed: run `make install` (needs Node 20)")


def tied(command: Sequence[str]) -> list[str]:
    """``command``, killed by the kernel when the thread that starts it ends (Linux only).

    The first word is a path: it is not looked for on the PATH.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _EXEC_TIED, str(os.getpid()), *command]


def spawn(binary: Path, arguments: Sequence[str]) -> AnvilProcess:
    """Start anvil. Call it in a thread that lives as long as the chain should.

    Linux counts the end of the *thread* that forked as the death of the parent.
    """
    folder = Path(tempfile.mkdtemp(prefix="farebox-anvil-"))
    log = (folder / "log").open("wb")
    # Old states would fill the user's home: nobody removes them after a SIGKILL of ours. Without
    # them a balance can be asked of the last 500 blocks; blocks, receipts and logs stay.
    own = ["--config-out", str(folder / "config.json")]
    own += ["--cache-path", str(folder / "states"), "--max-persisted-states", "0"]
    command = tied([str(binary), *arguments, *own])
    # A session of its own: Ctrl-C in the terminal reaches us alone, and we stop the child.
    child = subprocess.Popen(  # noqa: S603  (a fixed binary, no shell)
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    return AnvilProcess(child, folder, log)


def wait_listening(process: AnvilProcess) -> int:
    """Block until anvil listens; its port. ``DevnetError`` says why it does not."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        text = (process.folder / "log").read_text(errors="replace")
        found = re.search(r"Listening on [^\s:]+:(\d+)", text)
        if found is not None:
            return int(found[1])
        if process.child.poll() is not None:
            raise DevnetError(f"anvil stopped at once: {_complaint(text)}")
        time.sleep(0.005)
    raise DevnetError(f"anvil did not listen within {START_S} s")


def _complaint(text: str) -> str:
    """The line of anvil's output that says what is wrong, else its last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines[-1:] or ["it said nothing"])[0]


def stop(process: AnvilProcess) -> None:
    """End anvil (it may still want to write a state file), kill it if it stays, clean up."""
    process.child.terminate()
    try:
        process.child.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.child.kill()
        process.child.wait()
    process.log.close()
    process.forget_files()
