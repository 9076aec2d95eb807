"""The ledger's invariants as queries that must return no rows.

They run after every test that touches money, on ``farebox ledger verify``, and in the background
loop. Each says what it would mean if it found something.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gateway.db import Tx
from gateway.ledger import chain
from gateway.ledger.steps import FIRST_ID


@dataclass(frozen=True, slots=True)
class Broken:
    """An invariant that does not hold, and where."""

    name: str
    meaning: str
    rows: tuple[dict[str, object], ...]


# What the transfers say of each lot.
_LOT_SUMS: Final = """SELECT ref,
          sum(CASE kind WHEN 'expire' THEN amount_units WHEN 'unexpire' THEN -amount_units
            ELSE 0 END) AS expired,
          sum(CASE kind WHEN 'reverse' THEN amount_units WHEN 'restore' THEN -amount_units
            ELSE 0 END) AS reversed,
          sum(CASE kind WHEN 'freeze' THEN amount_units WHEN 'unfreeze' THEN -amount_units
            ELSE 0 END) AS suspense,
          sum(CASE kind WHEN 'debt' THEN amount_units WHEN 'forgive' THEN -amount_units
            ELSE 0 END) AS short,
          sum(CASE kind WHEN 'repay' THEN amount_units WHEN 'unrepay' THEN -amount_units
            ELSE 0 END) AS repaid,
          sum(CASE kind WHEN 'loss' THEN amount_units WHEN 'recover' THEN -amount_units
            ELSE 0 END) AS lost,
          sum(CASE kind WHEN 'withhold' THEN amount_units WHEN 'release' THEN -amount_units
            ELSE 0 END) AS outgoing,
          sum(CASE kind WHEN 'payout' THEN amount_units ELSE 0 END) AS paid_out
        FROM transfer WHERE kind IN ('expire', 'unexpire', 'reverse', 'restore', 'freeze',
          'unfreeze', 'debt', 'forgive', 'repay', 'unrepay', 'loss', 'recover', 'withhold',
          'release', 'payout')
        GROUP BY ref"""

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
    "I1_house_side_of_kind": (
        "a transfer is with another account of the house than its kind is for",
        """SELECT id, kind, debit, credit FROM transfer WHERE NOT CASE kind
          WHEN 'mint' THEN debit = 1 WHEN 'restore' THEN debit = 1 WHEN 'reverse' THEN credit = 1
          WHEN 'capture' THEN credit = 2 WHEN 'void' THEN credit = 2 WHEN 'refund' THEN debit = 2
          WHEN 'expire' THEN credit = 3 WHEN 'unexpire' THEN debit = 3
          WHEN 'freeze' THEN credit = 4 WHEN 'unfreeze' THEN debit = 4
          WHEN 'debt' THEN debit = 5 WHEN 'unrepay' THEN debit = 5
          WHEN 'repay' THEN credit = 5 WHEN 'forgive' THEN credit = 5
          WHEN 'withhold' THEN credit = 6 WHEN 'release' THEN debit = 6
          WHEN 'payout' THEN credit = 7
          WHEN 'loss' THEN debit = 8 WHEN 'recover' THEN credit = 8 ELSE 1 = 0 END""",
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
    "I1_debt_is_sum": (
        "an account's debt is not what its lots are short of, less what was repaid",
        """SELECT a.id, a.debt, l.total FROM account a LEFT JOIN (
          SELECT account_id, sum(short_units - repaid_units) AS total FROM lot
          GROUP BY account_id) l
        ON l.account_id = a.id WHERE a.debt <> coalesce(l.total, 0)""",
    ),
    # Only changes are noted, so they take turns; their ids are of many blocks and tell no order.
    "I3_freeze_was_decided": (
        "an account is frozen and nobody did it, or is not and somebody did",
        """SELECT a.id, a.frozen, o.standing FROM account a LEFT JOIN (
          SELECT account_id, sum(CASE action WHEN 'freeze' THEN 1 ELSE -1 END) AS standing
          FROM operator_action WHERE action IN ('freeze', 'unfreeze') GROUP BY account_id) o
        ON o.account_id = a.id WHERE a.frozen <> coalesce(o.standing, 0)""",
    ),
    "I3_loss_was_decided": (
        "a debt was written off and nobody did it, or somebody did and it was not",
        """SELECT t.id, t.account_id, o.account_id AS noted FROM transfer t
        LEFT JOIN operator_action o ON o.action = 'write_off' AND o.ref = t.id
          AND o.account_id = t.account_id
        WHERE t.kind = 'loss' AND o.id IS NULL
        UNION ALL SELECT o.ref, NULL, o.account_id FROM operator_action o
        LEFT JOIN transfer t ON t.id = o.ref AND t.kind = 'loss'
          AND t.account_id = o.account_id
        WHERE o.action = 'write_off' AND t.id IS NULL""",
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
    "I6_refund_is_of_its_charge": (
        "more was refunded than was charged, or for another account",
        """SELECT r.charge_id, t.amount_units AS charged, r.units FROM (
          SELECT charge_id, account_id, sum(amount_units) AS units FROM refund
          GROUP BY charge_id, account_id) r
        LEFT JOIN transfer t ON t.id = r.charge_id AND t.kind = 'capture'
          AND t.account_id = r.account_id
        WHERE t.id IS NULL OR r.units > t.amount_units""",
    ),
    "I6_refund_is_whole": (
        "a refund, its transfer and the lots it went to differ",
        """SELECT r.id, r.amount_units, p.units FROM refund r
        LEFT JOIN transfer t ON t.id = r.id AND t.kind = 'refund' AND t.ref = r.charge_id
          AND t.account_id = r.account_id AND t.amount_units = r.amount_units
        LEFT JOIN (SELECT refund_id, sum(amount_units) AS units FROM refund_part
          GROUP BY refund_id) p ON p.refund_id = r.id
        WHERE t.id IS NULL OR r.amount_units <> coalesce(p.units, 0)
        UNION ALL SELECT t.id, t.amount_units, NULL FROM transfer t LEFT JOIN refund r
          ON r.id = t.id WHERE t.kind = 'refund' AND r.id IS NULL
        UNION ALL SELECT p.refund_id, p.amount_units, NULL FROM refund_part p LEFT JOIN refund r
          ON r.id = p.refund_id WHERE r.id IS NULL""",
    ),
    "I6_payout_is_its_transfers": (
        "a payout, what was withheld for it and how it ended differ",
        """SELECT p.id, p.amount_units FROM payout p
        LEFT JOIN transfer w ON w.id = p.id AND w.kind = 'withhold' AND w.ref = p.lot_id
          AND w.account_id = p.account_id AND w.amount_units = p.amount_units
        LEFT JOIN payout_end e ON e.payout_id = p.id
        LEFT JOIN transfer t ON t.id = e.transfer_id AND t.ref = p.lot_id
          AND t.kind = CASE WHEN e.paid = 1 THEN 'payout' ELSE 'release' END
          AND t.account_id = p.account_id AND t.amount_units = p.amount_units
        WHERE w.id IS NULL OR (e.payout_id IS NOT NULL AND t.id IS NULL)
        UNION ALL SELECT e.payout_id, e.transfer_id FROM payout_end e
          LEFT JOIN payout p ON p.id = e.payout_id WHERE p.id IS NULL
        UNION ALL SELECT t.id, t.amount_units FROM transfer t LEFT JOIN payout p ON p.id = t.id
          WHERE t.kind = 'withhold' AND p.id IS NULL
        UNION ALL SELECT t.id, t.amount_units FROM transfer t LEFT JOIN payout_end e
          ON e.transfer_id = t.id AND e.paid = 1 WHERE t.kind = 'payout' AND e.payout_id IS NULL""",
    ),
    "I6_payout_is_its_payment": (
        "money went out, or did not, and the ledger says otherwise",
        """SELECT p.id, p.state, o.amount_units, e.paid FROM payment p
        LEFT JOIN payout o ON o.payment_id = p.id AND o.amount_units = p.amount_units
        LEFT JOIN payout_end e ON e.payout_id = o.id
        WHERE p.provider = 'payout' AND (o.id IS NULL OR p.state <> CASE
          WHEN e.payout_id IS NULL THEN 'processing' WHEN e.paid = 1 THEN 'succeeded'
          ELSE 'failed' END)""",
    ),
    "I8_lot_adds_up": (
        "a lot's units are not all accounted for",
        """SELECT l.id, l.minted_units, l.remaining_units FROM lot l
        LEFT JOIN (SELECT lot_id, sum(to_pos - from_pos) AS units FROM segment GROUP BY lot_id) s
          ON s.lot_id = l.id
        LEFT JOIN (SELECT lot_id, sum(coalesce(captured_units, amount_units)) AS units FROM pin
          GROUP BY lot_id) p ON p.lot_id = l.id
        LEFT JOIN (SELECT lot_id, sum(amount_units) AS units FROM refund_part GROUP BY lot_id) r
          ON r.lot_id = l.id
        WHERE l.minted_units <> l.remaining_units + l.expired_units + l.repaid_units
          + l.outgoing_units + l.paid_out_units
          - l.short_units - l.lost_units
          + CASE WHEN l.state = 'frozen' THEN l.minted_units ELSE l.reversed_units END
          + coalesce(s.units, 0) + coalesce(p.units, 0) - coalesce(r.units, 0)""",
    ),
    "I8_lot_is_its_transfers": (
        "what expired, was reversed, frozen, lent, lost, repaid or paid out of a lot is not in the"
        " transfers",
        """SELECT l.id, l.state, t.* FROM lot l LEFT JOIN ({lot_sums}) t ON t.ref = l.id
        WHERE l.expired_units <> coalesce(t.expired, 0)
          OR l.reversed_units <> coalesce(t.reversed, 0)
          OR l.short_units <> coalesce(t.short, 0) OR l.repaid_units <> coalesce(t.repaid, 0)
          OR l.lost_units <> coalesce(t.lost, 0)
          OR l.outgoing_units <> coalesce(t.outgoing, 0)
          OR l.paid_out_units <> coalesce(t.paid_out, 0)
          OR CASE WHEN l.state = 'frozen' THEN l.minted_units - l.reversed_units ELSE 0 END
            <> coalesce(t.suspense, 0)
        UNION ALL SELECT NULL, NULL, t.* FROM ({lot_sums}) t
          LEFT JOIN lot l ON l.id = t.ref WHERE l.id IS NULL""",
    ),
    "I8_lot_is_in_one_state": (
        "a lot that cannot be spent holds something, or one owes and lends at once",
        """SELECT id, state, remaining_units, short_units, lost_units, repaid_units FROM lot
        WHERE (state <> 'live' AND remaining_units <> 0)
          OR (short_units + lost_units > 0 AND repaid_units > 0)
          OR short_units + lost_units > CASE WHEN state = 'frozen' THEN minted_units
            ELSE reversed_units END
          OR (state = 'frozen' AND expired_units <> 0)
          OR outgoing_units < 0 OR paid_out_units < 0
          OR state NOT IN ('live', 'expired', 'frozen')""",
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
    "I8_limited_hold_is_of_its_lots": (
        "a hold that may be taken from certain lots only stands on others, or not wholly",
        """SELECT h.id, h.max_units, h.epoch, p.units FROM hold h
        LEFT JOIN hold_limit o ON o.hold_id = h.id
        LEFT JOIN (SELECT hold_id, sum(amount_units) AS units FROM pin GROUP BY hold_id) p
          ON p.hold_id = h.id
        WHERE (h.epoch < 0) <> (o.hold_id IS NOT NULL)
          OR (o.hold_id IS NOT NULL AND h.max_units <> coalesce(p.units, 0))
        UNION ALL SELECT o.hold_id, NULL, NULL, NULL FROM hold_limit o
          LEFT JOIN hold h ON h.id = o.hold_id WHERE h.id IS NULL
        UNION ALL SELECT p.hold_id, p.lot_id, NULL, p.amount_units FROM pin p
          JOIN hold_limit o ON o.hold_id = p.hold_id LEFT JOIN lot l ON l.id = p.lot_id
        WHERE l.id IS NULL OR l.id <> coalesce(o.lot_id, l.id)
          OR l.source <> coalesce(o.source, l.source)
          OR coalesce(l.payer, '') <> coalesce(o.payer, l.payer, '')""",
    ),
    "I1_breakdown_is_the_charge": (
        "the lines of a charge do not add up to it",
        """SELECT b.hold_id, b.amount_units, t.amount_units AS charged FROM breakdown b
        LEFT JOIN transfer t ON t.id = b.hold_id AND t.kind = 'capture'
        WHERE t.id IS NULL OR t.amount_units <> b.amount_units""",
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
          sum(CASE WHEN kind = 'capture' THEN amount_units WHEN kind = 'refund'
            THEN -amount_units ELSE 0 END) AS spent
          FROM transfer GROUP BY account_id) t ON t.account_id = a.id
        WHERE a.added <> coalesce(t.added, 0) OR a.spent <> coalesce(t.spent, 0)""",
    ),
}

# How long after its lease a hold may still wait for the sweeper before that is a fault.
OVERDUE_MS: Final = 120_000


async def verify(tx: Tx, now_ms: int, *, chains: bool = True) -> list[Broken]:
    """Run every audit query in one snapshot. An empty list: the books are in order.

    ``chains``: also hash every hold and transfer there is, which takes this process's time where
    the queries take the database's.
    """
    broken = []
    for name, (meaning, query) in QUERIES.items():
        sql = query.replace("{first}", str(FIRST_ID)).replace("{lot_sums}", _LOT_SUMS)
        rows = await tx.fetch(sql)
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
    return broken + await _verify_chains(tx) if chains else broken


async def _verify_chains(tx: Tx) -> list[Broken]:
    faults = await chain.check(tx)
    found = []
    if faults.broken:
        meaning = "what a batch wrote was changed afterwards"
        found.append(Broken("I10_batch_is_as_written", meaning, tuple(faults.broken)))
    if faults.unchained:
        meaning = "there are rows that stand in no batch"
        found.append(Broken("I10_every_row_is_in_a_batch", meaning, tuple(faults.unchained)))
    return found
