"""The documentation says what is true: commands, settings, error statuses, links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gateway import cli, sections, settings, terminal
from gateway.errors import CODES

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
OPERATOR = (ROOT / "docs" / "operator.md").read_text(encoding="utf-8")


def commands(group: Any = cli.main, above: str = "farebox") -> list[str]:
    found: list[str] = []
    for name, command in group.commands.items():
        here = f"{above} {name}"
        found += commands(command, here) if hasattr(command, "commands") else [here]
    return found


def test_every_command_is_described_and_no_other() -> None:
    described = set(re.findall(r"^\| `(farebox [a-z -]*[a-z])", OPERATOR, re.MULTILINE))
    assert described == set(commands())


def test_every_exit_code_is_described() -> None:
    section = OPERATOR.split("| exit code |")[1].split("##")[0]
    described = {int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)}
    codes = {terminal.OK, terminal.NO, terminal.USAGE, terminal.CONFIG, terminal.UNREACHABLE}
    assert described == {*codes, 130}


def test_every_setting_is_described_and_no_other() -> None:
    described = set()
    for cell in re.findall(r"^\| (`[^|]*?`)(?: ○)? \|", OPERATOR, re.MULTILINE):
        described |= set(re.findall(r"`([a-z_0-9]+)`", cell))
    every = set()
    for model in (
        settings.Server,
        settings.Credits,
        settings.Chain,
        settings.Stripe,
        settings.Facilitator,
        sections.External,
        settings.Upstream,
        settings.Route,
        settings.Bazaar,
    ):
        every |= {field.alias or name for name, field in model.model_fields.items()}
    assert described == every - {"name", "network"}


def test_a_setting_without_effect_is_marked() -> None:
    marked = set(re.findall(r"^\| `([a-z_]+)` ○ \|", OPERATOR, re.MULTILINE))
    fields = {
        name: getattr(settings, model).model_fields[name] for model, name in settings.NO_EFFECT
    }
    assert marked == {field.alias or name for name, field in fields.items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_decisions_are_numbered_from_one_without_a_gap() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    for page in pages:
        assert page.read_text(encoding="utf-8").startswith(f"# {int(page.name[:4])}. "), page.name


# What else is named like a code: members of requests and answers, and a setting.
MEMBERS = {
    "after_s",
    "at_most",
    "price_text",
    "balance_units",
    "charged_units",
    "cut_at_hold",  # within a stream that has begun
    "held_units",
    "so_far_units",
    "expires_at_ms",
    "input_required",  # a type of MCP results
    "input_schema",
    "charged_credits",
    "expected_message",
    "expires_at",
    "personal_sign",
    "request_id",
    "session_nonce",
    "suggested_credits",
    "next_actions",
    "now_s",
    "min_onchain",
    "wallet_address",
    "next_cursor",
    "not_charged",
    "payer_signature",
    "price_version",
    "purchase_id",
    "sponsor_signature",
    "transaction_hash",
    "amount_usd",
}


def test_codes_that_are_named_exist() -> None:
    text = (ROOT / "docs" / "agent.md").read_text(encoding="utf-8")
    for code in re.findall(r"`([a-z]+_[a-z_]+)`", text):
        known = code in CODES or code in MEMBERS
        assert known, code


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"(?:^|`)make ([a-z]+)", _code(page), re.MULTILINE):
            assert target in targets, f"{page.name}: make {target}"


def _code(page: Path) -> str:
    """What stands in code: fenced blocks and inline."""
    text = page.read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))
