"""What all commands share: exit codes, options, output for people and for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import click

if TYPE_CHECKING:
    from gateway.settings import Settings

OK: Final = 0
NO: Final = 1
USAGE: Final = 2
CONFIG: Final = 3
UNREACHABLE: Final = 4
DEFAULT_CONFIG: Final = "farebox.toml"

F = TypeVar("F", bound=Callable[..., Any])


class Stop(Exception):  # noqa: N818  (not a mistake of the program)
    """Ends the command with a message for a person and an exit code."""

    def __init__(self, message: str, code: int, faults: list[str] | None = None) -> None:
        self.code = code
        self.faults = faults or [message]
        super().__init__(message)


def say(text: str, **style: Any) -> None:
    """A line for a person on stdout; colour only on a terminal, never under NO_COLOR."""
    from gateway.config import environ

    colour = sys.stdout.isatty() and not environ().get("NO_COLOR")
    click.echo(click.style(text, **style) if style and colour else text)


def put(value: Any) -> None:
    """One JSON object on one line of stdout."""
    click.echo(json.dumps(value, ensure_ascii=False, separators=(", ", ": "), default=str))


def fail(stop: Stop, *, as_json: bool) -> NoReturn:
    """Print a fault the way the command prints everything, and leave."""
    if as_json:
        put({"ok": False, "exit": stop.code, "faults": stop.faults})
    for line in stop.faults:
        click.echo(f"farebox: {line}", err=True)
    sys.exit(stop.code)


def common(command: F) -> F:
    """The options every command has."""
    command = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")(
        command
    )
    return click.option(
        "--config",
        "config",
        type=click.Path(path_type=Path),
        envvar="FAREBOX_CONFIG",
        help=f"Configuration file (default: {DEFAULT_CONFIG} here).",
    )(command)


def read_settings(config: Path | None, overrides: dict[str, Any] | None = None) -> Settings:
    """The settings of ``--config``, or of the default file. Raises ``Stop``."""
    from gateway.check import judge
    from gateway.config import ConfigError, load

    try:
        return load(config or Path(DEFAULT_CONFIG), overrides=overrides, judge=judge)
    except ConfigError as error:
        raise Stop(str(error), CONFIG, error.faults) from None
