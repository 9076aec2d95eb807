"""The ledger once more, small and slow, written from its design and not from its code.

It does everything at once and keeps nothing twice: a capture is taken from lots the moment it
happens, earliest expiry first; a lot dies the moment it expires; what can be spent is counted from
the lots and the open holds whenever somebody asks. The real ledger is compared with it lot by lot.

A lot can be claimed by others: all of it in a dispute, or what was reversed. What it cannot give
at once, because it was spent or is needed by open holds, it is short of; an account owes what its
lots are short of, less what others of its lots have repaid. A debt that was written off is lost: it
is the house's, and so is what comes back to the lot, once the lot is short of nothing.

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
    source: str = ""
    payer: str | None = None
    captured: int = 0  # less what was refunded
    expired: int = 0
    alive: bool = True
    frozen: bool = False
    reversed: int = 0
    short: int = 0
    repaid: int = 0
    lost: int = 0

    @property
    def claim(self) -> int:
        return self.minted if self.frozen else self.reversed


@dataclass
class Hold:
    """A promise to a running call. ``pins``: stretches of it that stand on dead lots."""

    name: int
    account: int
    max: int
    content: bytes
    aliases: set[str]
    lease_ms: int
    pins: list[tuple[Lot, int]] = field(default_factory=list)
    closed: tuple[str, int] | None = None  # capture or void, and how much
    paid_by: list[Lot] = field(default_factory=list)  # one entry for each unit, in order
    refunded: int = 0

    @property
    def floating(self) -> int:
        """What is not pinned: it takes a lot only when it is captured."""
        return self.max - sum(units for _, units in self.pins)


def _named(lot: Lot, only: tuple[int | None, str | None, str | None]) -> bool:
    """Whether a lot is all that a hold asks of its lots."""
    said = zip(only, (lot.name, lot.source, lot.payer), strict=True)
    return all(wanted is None or wanted == has for wanted, has in said)


@dataclass
class Model:
    """All accounts. ``now_ms`` only grows."""

    now_ms: int = 0
    lots: list[Lot] = field(default_factory=list)
    holds: dict[int, Hold] = field(default_factory=dict)
    facts: dict[tuple[str, str, int], Lot] = field(default_factory=dict)
    by_value: dict[tuple[int, str, str, str], Hold] = field(default_factory=dict)
    by_alias: dict[tuple[int, str, str], Hold] = field(default_factory=dict)
    refunds: dict[tuple[int, str], tuple[int, int | None, int]] = field(default_factory=dict)
    stopped: set[int] = field(default_factory=set)  # frozen by an operator
    given_up: int = 0  # units ever written off
    recovered: int = 0  # units of those that came back to the house

    # --- what can be asked ------------------------------------------------------------------

    def of(self, account: int) -> list[Lot]:
        return [lot for lot in self.lots if lot.account == account]

    def debt(self, account: int) -> int:
        """What an account owes."""
        return sum(lot.short - lot.repaid for lot in self.of(account))

    def spent(self, account: int) -> int:
        return sum(lot.captured for lot in self.of(account))

    def live(self, account: int) -> list[Lot]:
        """Live lots in the order they are spent."""
        mine = [lot for lot in self.of(account) if lot.alive and not lot.frozen]
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
        self._pin(lot, lot.remaining)
        lot.expired += lot.remaining
        lot.remaining = 0

    def _pin(self, lot: Lot, units: int) -> None:
        for hold in self.open(lot.account):
            part = min(hold.floating, units)
            if part:
                hold.pins.append((lot, part))
                lot.remaining -= part
                units -= part

    # --- steps ------------------------------------------------------------------------------

    def mint(
        self,
        name: int,
        account: int,
        amount: int,
        fact: tuple[str, str, int],
        expires_ms: int = FOR_EVER,
        *,
        source: str = "",
        payer: str | None = None,
    ) -> tuple[object, ...]:
        if fact in self.facts:
            before = self.facts[fact]
            return ("minted before", before.name, before.account, before.minted)
        lot = Lot(name, account, expires_ms, amount, amount, source, payer)
        self.lots.append(lot)
        self.facts[fact] = lot
        lot.remaining -= self._repay(lot, amount)
        self.at(self.now_ms)  # it may be due already
        return ("minted", lot.name, *self.balance(account))

    def hold(
        self,
        name: int,
        account: int,
        guard: tuple[str, str, str, str | None, str | None],
        *,
        content: bytes,
        units: int,
        lease_ms: int,
        only: tuple[int | None, str | None, str | None] = (None, None, None),
    ) -> tuple[object, ...]:
        principal, scheme, value, alias, payment = guard
        mine = self.by_value.get((account, principal, scheme, value))
        paid = self.by_alias.get((account, principal, payment)) if payment else None
        theirs = self.by_alias.get((account, principal, alias)) if alias else None
        known = mine or paid or theirs
        if known is not None:
            said = alias or payment
            unbound = mine is not None and said and mine.aliases and said not in mine.aliases
            others = any(other is not None and other is not known for other in (paid, theirs))
            if unbound or others or known.content != content:
                return ("conflict", known.name)
            return ("repeated", known.name, known.closed)
        if account in self.stopped or self.debt(account):
            return ("frozen", self.debt(account))
        available, _ = self.balance(account)
        mine_only = [lot for lot in self.live(account) if _named(lot, only)]
        if any(only):
            available = min(available, sum(lot.remaining for lot in mine_only))
        if units > available:
            return ("short", available, units)
        hold = Hold(name, account, units, content, set(), self.now_ms + lease_ms)
        self.holds[name] = hold
        self.by_value[account, principal, scheme, value] = hold
        for each in filter(None, (alias, payment)):
            self.by_alias[account, principal, each] = hold
            hold.aliases.add(each)
        if any(only):  # it takes its lots now, and not when it is captured
            for lot in mine_only:
                part = min(lot.remaining, hold.floating)
                if part:
                    hold.pins.append((lot, part))
                    lot.remaining -= part
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
        unused = []
        for lot, units in sorted(hold.pins, key=lambda pin: (pin[0].expires_ms, pin[0].name)):
            part = min(units, amount)
            self._capture(hold, lot, part)
            unused.append((lot, units - part))
            amount -= part
        for lot in self.live(hold.account):
            part = min(lot.remaining, amount)
            lot.remaining -= part
            self._capture(hold, lot, part)
            amount -= part
        for lot, units in unused:
            self._give_back(lot, units)
        assert amount == 0, "a hold must be covered until it ends"
        return ("closed", *hold.closed, *self.balance(hold.account))

    def _capture(self, hold: Hold, lot: Lot, units: int) -> None:
        lot.captured += units
        hold.paid_by += [lot] * units

    def refund(self, name: int, amount: int | None, key: str) -> tuple[object, ...]:
        hold = self.holds[name]
        known = self.refunds.get((hold.account, key))
        if known is not None:
            same = known[:2] == (name, amount)
            return ("refunded before", known[2]) if same else ("refund conflict",)
        left = len(hold.paid_by)
        units = left if amount is None else amount
        if units > left or left == 0:
            return ("not refundable", left)
        self.refunds[hold.account, key] = (name, amount, units)
        for _ in range(units):
            lot = hold.paid_by.pop()
            lot.captured -= 1
            hold.refunded += 1
            self._give_back(lot, 1)
        return ("refunded", units, *self.balance(hold.account))

    def claim(
        self, name: int, *, frozen: bool | None = None, total: int | None = None
    ) -> tuple[object, ...]:
        """Freeze or unfreeze a lot, or say how much of it was reversed in all."""
        lot = next(lot for lot in self.lots if lot.name == name)
        before = (lot.frozen, lot.reversed)
        after = (
            lot.frozen if frozen is None else frozen,
            lot.reversed if total is None else total,
        )
        if before != after:
            free, _ = self.balance(lot.account)
            more = (lot.minted if after[0] else after[1]) - lot.claim
            if more > 0:
                self._take(lot, more, free)
            lot.frozen, lot.reversed = after
            if more < 0:
                self._give_back(lot, -more)
        return ("lot", before != after, self.debt(lot.account), *self.balance(lot.account))

    def write_off(self, name: int) -> tuple[object, ...]:
        """The house bears what the account owes for a lot, unless that is still in dispute."""
        lot = next(lot for lot in self.lots if lot.name == name)
        units = 0 if lot.frozen else min(lot.short, self.debt(lot.account))
        lot.short -= units
        lot.lost += units
        self.given_up += units
        return ("lot", units > 0, self.debt(lot.account), *self.balance(lot.account))

    def reopen(self, name: int) -> tuple[object, ...]:
        """What was lost with a lot is owed again."""
        lot = next(lot for lot in self.lots if lot.name == name)
        units, lot.lost = lot.lost, 0
        lot.short += units
        return ("lot", units > 0, self.debt(lot.account), *self.balance(lot.account))

    def _take(self, lot: Lot, units: int, free: int) -> None:
        """What nobody needs of it first, then what the house had of it, then what it repaid."""
        at_hand = min(units, lot.remaining)
        part = min(at_hand, free)
        lot.remaining -= part
        units -= part
        self._pin(lot, at_hand - part)  # and is short of it until the holds let go
        part = min(units, lot.expired)
        lot.expired -= part
        units -= part
        part = min(units, lot.repaid)
        lot.repaid -= part
        lot.short += units - part

    def _give_back(self, lot: Lot, units: int) -> None:
        own = min(units, lot.short)
        lot.short -= own
        # If nothing is owed any more, those who paid get back what was too much.
        for payer in sorted(self.of(lot.account), key=lambda each: -each.name):
            part = min(payer.repaid, max(-self.debt(lot.account), 0))
            payer.repaid -= part
            self._home(payer, part)
        lost = min(units - own, lot.lost)
        lot.lost -= lost
        self.recovered += lost
        self._home(lot, units - own - lost)

    def _home(self, lot: Lot, units: int) -> None:
        units -= self._repay(lot, units)
        assert not (units and lot.frozen), "nothing of a frozen lot is free"
        if lot.expires_ms <= self.now_ms:
            lot.expired += units
        else:
            lot.remaining += units

    def _repay(self, lot: Lot, units: int) -> int:
        part = min(units, max(self.debt(lot.account), 0))
        lot.repaid += part
        return part

    def stop(self, account: int, *, frozen: bool) -> tuple[object, ...]:
        """An operator freezes the account, or lets it go."""
        changed = (account in self.stopped) != frozen
        self.stopped = self.stopped | {account} if frozen else self.stopped - {account}
        return ("account", frozen, changed)

    def look(self, account: int) -> tuple[object, ...]:
        return ("current", *self.balance(account))
