"""The ledger once more, small and slow, written from its design and not from its code.

It does everything at once and keeps nothing twice: a capture is taken from lots the moment it
happens, earliest expiry first; a lot dies the moment it expires; what can be spent is counted from
the lots and the open holds whenever somebody asks. The real ledger is compared with it lot by lot.

Outcomes are tuples that begin with a word. Lots and holds have the names the ledger gave them
(their ids): of two lots that expire together the lower one is spent first, and the lower of two
holds counts as the older one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FOR_EVER = 2**62


@dataclass
class Lot:
    """Credits that were minted together."""

    name: int
    account: int
    expires_ms: int
    minted: int
    remaining: int
    captured: int = 0
    expired: int = 0
    alive: bool = True


@dataclass
class Hold:
    """A promise to a running call. ``pins``: stretches of it that stand on dead lots."""

    name: int
    account: int
    max: int
    content: bytes
    alias: str | None
    lease_ms: int
    pins: list[tuple[Lot, int]] = field(default_factory=list)
    closed: tuple[str, int] | None = None  # capture or void, and how much

    @property
    def floating(self) -> int:
        """What is not pinned: it takes a lot only when it is captured."""
        return self.max - sum(units for _, units in self.pins)


@dataclass
class Model:
    """All accounts. ``now_ms`` only grows."""

    now_ms: int = 0
    lots: list[Lot] = field(default_factory=list)
    holds: dict[int, Hold] = field(default_factory=dict)
    facts: dict[tuple[str, str, int], Lot] = field(default_factory=dict)
    by_value: dict[tuple[int, str, str, str], Hold] = field(default_factory=dict)
    by_alias: dict[tuple[int, str, str], Hold] = field(default_factory=dict)
    stopped: set[int] = field(default_factory=set)  # frozen, or in debt

    # --- what can be asked ------------------------------------------------------------------

    def live(self, account: int) -> list[Lot]:
        """Live lots in the order they are spent."""
        mine = [lot for lot in self.lots if lot.account == account and lot.alive]
        return sorted(mine, key=lambda lot: (lot.expires_ms, lot.name))

    def open(self, account: int) -> list[Hold]:
        """Open holds, oldest first."""
        mine = [h for h in self.holds.values() if h.account == account and not h.closed]
        return sorted(mine, key=lambda hold: hold.name)

    def balance(self, account: int) -> tuple[int, int]:
        """What can be spent, and what is promised to open holds."""
        holds = self.open(account)
        rest = sum(lot.remaining for lot in self.live(account))
        return rest - sum(hold.floating for hold in holds), sum(hold.max for hold in holds)

    # --- time -------------------------------------------------------------------------------

    def at(self, now_ms: int) -> None:
        """Let time pass: everything that expires on the way expires at its own moment."""
        assert now_ms >= self.now_ms
        self.now_ms = now_ms
        due = [lot for lot in self.lots if lot.alive and lot.expires_ms <= now_ms]
        for lot in sorted(due, key=lambda lot: (lot.expires_ms, lot.name)):
            self._die(lot)

    def _die(self, lot: Lot) -> None:
        """The oldest holds keep what they may still need of it; the rest expires."""
        lot.alive = False
        for hold in self.open(lot.account):
            part = min(hold.floating, lot.remaining)
            if part:
                hold.pins.append((lot, part))
                lot.remaining -= part
        lot.expired += lot.remaining
        lot.remaining = 0

    # --- steps ------------------------------------------------------------------------------

    def mint(
        self,
        name: int,
        account: int,
        amount: int,
        fact: tuple[str, str, int],
        expires_ms: int = FOR_EVER,
    ) -> tuple[object, ...]:
        if fact in self.facts:
            before = self.facts[fact]
            return ("minted before", before.name, before.account, before.minted)
        lot = Lot(name, account, expires_ms, amount, amount)
        self.lots.append(lot)
        self.facts[fact] = lot
        self.at(self.now_ms)  # it may be due already
        return ("minted", lot.name, *self.balance(account))

    def hold(
        self,
        name: int,
        account: int,
        guard: tuple[str, str, str, str | None],
        *,
        content: bytes,
        units: int,
        lease_ms: int,
    ) -> tuple[object, ...]:
        principal, scheme, value, alias = guard
        mine = self.by_value.get((account, principal, scheme, value))
        theirs = self.by_alias.get((account, principal, alias)) if alias else None
        if mine is not None:
            other_alias = alias is not None and mine.alias is not None and mine.alias != alias
            if other_alias or (theirs is not None and theirs is not mine):
                return ("conflict", mine.name)
        known = mine or theirs
        if known is not None:
            if known.content != content:
                return ("conflict", known.name)
            return ("repeated", known.name, known.closed)
        if account in self.stopped:
            return ("frozen",)
        available, _ = self.balance(account)
        if units > available:
            return ("short", available, units)
        hold = Hold(name, account, units, content, alias, self.now_ms + lease_ms)
        self.holds[name] = hold
        self.by_value[account, principal, scheme, value] = hold
        if alias:
            self.by_alias[account, principal, alias] = hold
        return ("held", hold.name, *self.balance(account))

    def close(
        self, name: int, amount: int, *, void: bool = False, if_lapsed: bool = False
    ) -> tuple[object, ...]:
        hold = self.holds[name]
        if hold.closed:
            return ("already closed", *hold.closed)
        if if_lapsed and hold.lease_ms > self.now_ms:
            return ("still leased",)
        hold.closed = ("void" if void else "capture", amount)
        for lot, units in sorted(hold.pins, key=lambda pin: (pin[0].expires_ms, pin[0].name)):
            part = min(units, amount)
            lot.captured += part
            lot.expired += units - part
            amount -= part
        for lot in self.live(hold.account):
            part = min(lot.remaining, amount)
            lot.captured += part
            lot.remaining -= part
            amount -= part
        assert amount == 0, "a hold must be covered until it ends"
        return ("closed", *hold.closed, *self.balance(hold.account))

    def look(self, account: int) -> tuple[object, ...]:
        return ("current", *self.balance(account))
