"""The ledger's invariants as queries that must return no rows.

They run after every test that touches money, on ``farebox ledger verify``, and in the background
loop. Each says what it would mean if it found something.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gateway.db import Tx
from gateway.ledger.steps import FIRST_ID


@dataclass(frozen=True, slots=True)
class Broken:
    """An invariant that does not hold, and where."""

    name: str
    meaning: str
    rows: tuple[dict[str, object], ...]


# name -> (what a row would mean, query). Written for both dialects; sums are cast because
# PostgreSQL adds bigints to numerics.
QUERIES: Final[dict[str, tuple[str, str]]] = {
    "I1_balance_is_sum": (
        "an account's balance is not the sum of its transfers",
        """SELECT a.id, a.available + a.held AS has, coalesce(t.total, 0) AS transfers
        FROM account a LEFT JOIN (
          SELECT account_id, sum(CASE WHEN credit = account_id THEN amount_units
            ELSE -amount_units END) AS total FROM transfer GROUP BY account_id) t
        ON t.account_id = a.id WHERE a.available + a.held <> coalesce(t.total, 0)""",
    ),
    "I1_house_is_sum": (
        "a house account is not the sum of its transfers",
        """SELECT id, sum(units) AS transfers_less_balance FROM (
          SELECT credit AS id, amount_units AS units FROM transfer
          UNION ALL SELECT debit, -amount_units FROM transfer
          UNION ALL SELECT account_id, -balance FROM house_balance) AS sides
        WHERE id < {first} GROUP BY id HAVING sum(units) <> 0""",
    ),
    "I1_sides": (
        "a transfer is not between its account and the house",
        """SELECT id, account_id, debit, credit FROM transfer
        WHERE NOT (debit = account_id AND credit < {first})
          AND NOT (credit = account_id AND debit < {first})""",
    ),
    "I2_account_is_known": (
        "a line, a hold or a lot belongs to no account",
        """SELECT x.account_id, x.id FROM (SELECT account_id, id FROM transfer
          UNION ALL SELECT account_id, id FROM hold UNION ALL SELECT account_id, id FROM lot) AS x
        LEFT JOIN account a ON a.id = x.account_id WHERE a.id IS NULL""",
    ),
    "I2_statement_is_whole": (
        "a line of a statement is missing, doubled or out of order",
        """SELECT * FROM (SELECT account_id, id, seq, prev_id, balance_units,
          row_number() OVER w AS true_seq, coalesce(lag(id) OVER w, 0) AS true_prev,
          sum(CASE WHEN credit = account_id THEN amount_units ELSE -amount_units END)
            OVER (PARTITION BY account_id ORDER BY seq) AS true_balance
          FROM transfer WINDOW w AS (PARTITION BY account_id ORDER BY seq)) AS line
        WHERE seq <> true_seq OR prev_id <> true_prev OR balance_units <> true_balance""",
    ),
    "I2_statement_head": (
        "an account does not point at its last transfer",
        """SELECT a.id, a.seq, a.last_id FROM account a LEFT JOIN (
          SELECT account_id, count(*) AS n FROM transfer GROUP BY account_id) t
          ON t.account_id = a.id
        LEFT JOIN transfer l ON l.id = a.last_id AND l.account_id = a.id AND l.seq = a.seq
        WHERE a.seq <> coalesce(t.n, 0) OR (a.seq > 0 AND l.id IS NULL)""",
    ),
    "I3_held_is_open_holds": (
        "what an account has held is not what its open holds reserve",
        """SELECT a.id, a.held, coalesce(o.total, 0) AS open_holds FROM account a LEFT JOIN (
          SELECT h.account_id, sum(h.max_units) AS total FROM hold h
          LEFT JOIN transfer t ON t.id = h.id WHERE t.id IS NULL GROUP BY h.account_id) o
        ON o.account_id = a.id WHERE a.held <> coalesce(o.total, 0)""",
    ),
    "I3_never_negative": (
        "an amount is below zero",
        """SELECT id, available, held, debt, pinned FROM account
        WHERE available < 0 OR held < 0 OR debt < 0 OR pinned < 0 OR pinned > held""",
    ),
    "I4_one_mint_per_fact": (
        "a mint has no outside fact, or a fact no mint",
        """SELECT l.id FROM lot l LEFT JOIN mint_key k ON k.lot_id = l.id
        GROUP BY l.id HAVING count(k.lot_id) <> 1
        UNION ALL SELECT k.lot_id FROM mint_key k LEFT JOIN lot l ON l.id = k.lot_id
        WHERE l.id IS NULL""",
    ),
    "I5_mint_is_lot": (
        "a lot and the transfer that made it differ",
        """SELECT coalesce(l.id, t.id) AS id, l.minted_units, t.amount_units FROM lot l
        LEFT JOIN transfer t ON t.id = l.id AND t.kind = 'mint' AND t.account_id = l.account_id
        WHERE t.id IS NULL OR t.amount_units <> l.minted_units
        UNION ALL SELECT t.id, NULL, t.amount_units FROM transfer t LEFT JOIN lot l
          ON l.id = t.id WHERE t.kind = 'mint' AND l.id IS NULL""",
    ),
    "I6_close_is_of_its_hold": (
        "a charge without a hold, beyond it, or for another account",
        """SELECT t.id, t.amount_units, h.max_units FROM transfer t LEFT JOIN hold h ON h.id = t.id
        WHERE t.kind IN ('capture', 'void') AND (h.id IS NULL OR h.account_id <> t.account_id
          OR t.amount_units > h.max_units OR (t.kind = 'void' AND t.amount_units <> 0))""",
    ),
    "I8_lot_adds_up": (
        "a lot's units are not all accounted for",
        """SELECT l.id, l.minted_units, l.remaining_units FROM lot l
        LEFT JOIN (SELECT lot_id, sum(to_pos - from_pos) AS units FROM segment GROUP BY lot_id) s
          ON s.lot_id = l.id
        LEFT JOIN (SELECT ref, sum(amount_units) AS units FROM transfer WHERE kind = 'expire'
          GROUP BY ref) e ON e.ref = l.id
        LEFT JOIN (SELECT lot_id, sum(coalesce(captured_units, amount_units)) AS units FROM pin
          GROUP BY lot_id) p ON p.lot_id = l.id
        WHERE l.minted_units <> l.remaining_units + coalesce(s.units, 0) + coalesce(e.units, 0)
          + coalesce(p.units, 0)""",
    ),
    "I8_lots_carry_balance": (
        "the live lots, less what is not booked on them yet, are not the balance",
        """SELECT a.id, coalesce(l.total, 0) AS lots, a.pos - a.folded AS unbooked,
          a.available + a.held - a.pinned AS floating FROM account a LEFT JOIN (
          SELECT account_id, sum(remaining_units) AS total FROM lot WHERE state = 'live'
          GROUP BY account_id) l ON l.account_id = a.id
        WHERE coalesce(l.total, 0) - (a.pos - a.folded) <> a.available + a.held - a.pinned""",
    ),
    "I8_pins_are_of_open_holds": (
        "a pin outlived its hold, or an account's pinned sum is wrong",
        """SELECT a.id, a.pinned, coalesce(p.total, 0) AS pins FROM account a LEFT JOIN (
          SELECT h.account_id, sum(p.amount_units) AS total FROM pin p JOIN hold h
          ON h.id = p.hold_id WHERE p.captured_units IS NULL GROUP BY h.account_id) p
        ON p.account_id = a.id WHERE a.pinned <> coalesce(p.total, 0)
        UNION ALL SELECT p.hold_id, p.amount_units, p.captured_units FROM pin p
        LEFT JOIN transfer t ON t.id = p.hold_id
        WHERE (t.id IS NULL) <> (p.captured_units IS NULL)""",
    ),
    "I8_tape_is_whole": (
        "captures overlap on the tape or leave a gap",
        """SELECT * FROM (SELECT account_id, id, pos, tape_units, coalesce(lag(pos + tape_units)
            OVER (PARTITION BY account_id ORDER BY seq), 0) AS true_pos
          FROM transfer WHERE kind = 'capture') AS line WHERE pos <> true_pos
        UNION ALL SELECT a.id, a.id, a.pos, coalesce(t.total, 0), 0 FROM account a LEFT JOIN (
          SELECT account_id, sum(tape_units) AS total FROM transfer GROUP BY account_id) t
        ON t.account_id = a.id WHERE a.pos <> coalesce(t.total, 0)""",
    ),
    "I8_segments_are_whole": (
        "booked stretches of the tape overlap or leave a gap",
        """SELECT * FROM (SELECT account_id, from_pos, to_pos, coalesce(lag(to_pos)
            OVER (PARTITION BY account_id ORDER BY from_pos), 0) AS true_from FROM segment)
          AS line WHERE from_pos <> true_from
        UNION ALL SELECT a.id, a.folded, coalesce(s.total, 0), 0 FROM account a LEFT JOIN (
          SELECT account_id, sum(to_pos - from_pos) AS total FROM segment GROUP BY account_id) s
        ON s.account_id = a.id WHERE a.folded <> coalesce(s.total, 0)""",
    ),
    "I8_next_expiry_is_early": (
        "a live lot expires before its account looks for it",
        """SELECT l.id, l.expires_ms, a.next_expiry_ms FROM lot l JOIN account a
          ON a.id = l.account_id WHERE l.state = 'live' AND l.remaining_units > 0
          AND l.expires_ms < a.next_expiry_ms""",
    ),
    "L10_lifetime_sums": (
        "lifetime added or spent is not the sum of the transfers",
        """SELECT a.id, a.added, a.spent FROM account a LEFT JOIN (SELECT account_id,
          sum(CASE WHEN kind = 'mint' THEN amount_units ELSE 0 END) AS added,
          sum(CASE WHEN kind = 'capture' THEN amount_units ELSE 0 END) AS spent
          FROM transfer GROUP BY account_id) t ON t.account_id = a.id
        WHERE a.added <> coalesce(t.added, 0) OR a.spent <> coalesce(t.spent, 0)""",
    ),
}

# How long after its lease a hold may still wait for the sweeper before that is a fault.
OVERDUE_MS: Final = 120_000


async def verify(tx: Tx, now_ms: int) -> list[Broken]:
    """Run every audit query in one snapshot. An empty list: the books are in order."""
    broken = []
    for name, (meaning, query) in QUERIES.items():
        rows = await tx.fetch(query.replace("{first}", str(FIRST_ID)))
        if rows:
            broken.append(Broken(name, meaning, tuple(dict(r) for r in rows[:20])))
    overdue = await tx.fetch(
        "SELECT h.id, h.account_id, coalesce(o.lease_ms, h.lease_ms) AS lease_ms FROM hold h"
        " LEFT JOIN transfer t ON t.id = h.id LEFT JOIN open_hold o ON o.hold_id = h.id"
        " WHERE t.id IS NULL AND coalesce(o.lease_ms, h.lease_ms) < $1",
        now_ms - OVERDUE_MS,
    )
    if overdue:
        rest = tuple(dict(r) for r in overdue[:20])
        broken.append(Broken("I9_holds_end", "a hold outlived its lease", rest))
    return broken
