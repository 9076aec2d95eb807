"""What the demo prints: lines with ticks for people, one JSON object a line for programs."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from gateway.config import environ

_PLAIN: Final = str.maketrans(
    {"✓": "ok", "✗": "NO", "→": "->", "…": "..", "·": "|", "−": "-", "—": "-"}
)
_COLOURS: Final = {"green": "32", "red": "31", "bold": "1", "dim": "2"}
_INDENT: Final = 13  # of what belongs to the line above
_MOST_COLUMNS: Final = 120


@dataclass(frozen=True, slots=True)
class Screen:
    """Where and how to print. Make it with ``screen``."""

    as_json: bool
    colour: bool
    unicode: bool
    columns: int | None  # None: not a terminal, lines are not wrapped

    def put(self, value: dict[str, Any]) -> None:
        """An object for programs; nothing in the form for people."""
        if self.as_json:
            _write(json.dumps(value, separators=(", ", ": "), default=str))

    def line(self, text: str = "", style: str = "") -> None:
        """A line for people; nothing in the form for programs."""
        if not self.as_json:
            _write(self._paint(self._spell(text), style))

    def tick(self, number: str, seconds: float, title: str, result: str, *, held: bool) -> None:
        """``✓ 1   12 ms  title  → result``, wrapped under the result on a narrow terminal."""
        if self.as_json:
            return
        mark = self._paint(self._spell("✓ " if held else "✗ "), "green" if held else "red")
        head = self._paint(f"{number:1} {took(seconds):>7}  ", "dim")
        first, *rest = self._wrap(self._spell(title + result), len(self._spell(title)))
        _write(f"{mark}{head}{first}")
        for each in rest:
            _write(" " * _INDENT + each)

    def under(self, text: str, style: str = "") -> None:
        """More about the line above."""
        if not self.as_json:
            for each in self._wrap(self._spell(text), 2):
                _write(" " * _INDENT + self._paint(each, style))

    def _wrap(self, text: str, hang: int) -> list[str]:
        """``text`` in lines for this terminal; from the second on ``hang`` columns in."""
        if self.columns is None:
            return [text]
        room = max(self.columns - _INDENT - 1, 40)
        lines = textwrap.wrap(
            text,
            room,
            subsequent_indent=" " * (hang if hang < room - 30 else 2),
            break_long_words=False,
            break_on_hyphens=False,
        )
        return lines or [""]

    def _spell(self, text: str) -> str:
        return text if self.unicode else text.translate(_PLAIN)

    def _paint(self, text: str, style: str) -> str:
        if not (self.colour and style):
            return text
        return f"\x1b[{_COLOURS[style]}m{text}\x1b[0m"


def screen(*, as_json: bool) -> Screen:
    """For this process's stdout: colour and wrapping only on a terminal, NO_COLOR respected."""
    terminal = sys.stdout.isatty()
    try:
        "".join(map(chr, _PLAIN)).encode(sys.stdout.encoding or "ascii")
        unicode = True
    except (UnicodeEncodeError, LookupError):
        unicode = False
    columns = min(shutil.get_terminal_size().columns, _MOST_COLUMNS) if terminal else None
    return Screen(as_json, terminal and not environ().get("NO_COLOR"), unicode, columns)


def took(seconds: float) -> str:
    """``12 ms``, ``1.8 s``: as exact as a person cares."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def snippets(url: str, private_key: str) -> list[tuple[str, Sequence[str]]]:
    """Copy-paste for a person whose demo keeps running: name, lines."""
    call = f"{url}/v1/forecast/oslo"
    return [
        ("curl: what everybody gets who does not pay", [f"curl -i {call}"]),
        (
            "Python (.venv/bin/python): signs, and pays by itself when the credits are spent",
            [
                "import httpx",
                "from wallet_auth.agent import WalletAuth",
                f'auth = WalletAuth("{private_key}")',
                "client = httpx.Client(auth=auth)",
                f'answer = client.get("{call}")',
                'print(answer.json(), answer.headers["farebox-balance"], "credits left")',
            ],
        ),
        (
            "TypeScript: the official x402 client (npm i @x402/fetch @x402/evm viem)",
            [
                'import { ExactEvmScheme } from "@x402/evm";',
                'import { wrapFetchWithPaymentFromConfig } from "@x402/fetch";',
                'import { privateKeyToAccount } from "viem/accounts";',
                f'const client = new ExactEvmScheme(privateKeyToAccount("{private_key}"));',
                "const pay = wrapFetchWithPaymentFromConfig(fetch, "
                '{ schemes: [{ network: "eip155:*", client }] });',
                f'console.log(await (await pay("{call}")).json());',
            ],
        ),
    ]
