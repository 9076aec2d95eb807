"""One writer a process: concurrent steps share a transaction and one fsync.

The writer lingers for two quiet turns of the event loop, so that requests that are ready together
are committed together; a single request does not wait for anybody. Answers go out only after the
commit. If a batch fails as a whole its steps are tried again one by one, so that one bad step
does not fail its neighbours. A step whose caller has gone away is applied all the same: whoever
asked for a hold closes it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable

from gateway.db import CommitUnknown, Database, DatabaseUnavailable, Tx, transact
from gateway.ledger.apply import apply
from gateway.ledger.chain import Chain
from gateway.ledger.ids import IdBlocks
from gateway.ledger.steps import Outcome, Step

MAX_BATCH = 256
MAX_QUEUE = 10_000
# Repeats come in crowds: after one, so many batches look for them before they write.
LOOK_AFTER_CONFLICT = 20
_Waiting = tuple[Step, "asyncio.Future[Outcome]"]


class WriterStopped(DatabaseUnavailable):
    """The process is shutting down, or its writer has died; nothing was written."""


class Writer:
    """Takes steps from any task and answers each when it is durable."""

    def __init__(self, db: Database, writer_id: int) -> None:
        self.id = writer_id
        self._db = db
        self._ids = IdBlocks()
        self._queue: deque[_Waiting] = deque()
        self._batch: list[_Waiting] = []
        self._arrived = asyncio.Event()
        self._stopping = False
        self._looking = 0
        self._chain: Chain | None = Chain(writer_id)
        self._task = asyncio.create_task(self._run(), name="ledger-writer")

    @classmethod
    async def start(cls, db: Database) -> Writer:
        """Register with the database (house balances are per writer) and begin."""
        async with db.write() as tx:
            writer_id = await _register(tx)
        return cls(db, writer_id)

    @property
    def alive(self) -> bool:
        return not self._task.done()

    async def submit(self, step: Step) -> Outcome:
        """Apply one step and return its outcome once it is committed.

        Raises ``DatabaseUnavailable`` when nothing was written, ``CommitUnknown`` when that
        cannot be told, ``LedgerFault`` for a mistake of the caller.
        """
        if self._stopping or not self.alive:
            raise WriterStopped("the ledger's writer has stopped")
        if len(self._queue) >= MAX_QUEUE:
            raise DatabaseUnavailable("the ledger's queue is full")
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._queue.append((step, future))
        self._arrived.set()
        # The step will be applied whether or not its caller still waits: the writer asks the
        # future whether anybody does, and the queue holds the step itself.
        return await future

    async def stop(self) -> None:
        """Take nothing new, finish what is queued."""
        self._stopping = True
        self._arrived.set()
        await self._task

    async def _run(self) -> None:
        try:
            while True:
                await self._arrived.wait()
                self._arrived.clear()
                while self._queue:
                    await self._linger()
                    size = min(len(self._queue), MAX_BATCH)
                    self._batch = [self._queue.popleft() for _ in range(size)]
                    await self._commit(self._batch)
                if self._stopping:
                    return
        finally:
            # However it ends, nobody may wait for an answer that will not come.
            _fail(self._batch, CommitUnknown("the ledger's writer ended in the middle"))
            _fail(self._queue, WriterStopped("the ledger's writer has stopped"))
            self._queue.clear()

    async def _linger(self) -> None:
        quiet = 0
        while quiet < 2 and len(self._queue) < MAX_BATCH:
            before = len(self._queue)
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._queue) == before else 0

    async def _commit(self, batch: list[_Waiting]) -> None:
        try:
            outcomes = await self._apply([step for step, _ in batch])
        except DatabaseUnavailable as error:
            _fail(batch, error)
        except Exception as error:
            if len(batch) == 1 or isinstance(error, CommitUnknown):
                # After a lost COMMIT a second try could be the second time: the caller is told.
                _fail(batch, error)
                return
            for one in batch:
                await self._commit([one])
        else:
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                if not future.done():
                    future.set_result(outcome)

    async def _apply(self, steps: list[Step]) -> list[Outcome]:
        tries = 0

        async def work(tx: Tx) -> list[Outcome]:
            nonlocal tries
            tries += 1
            as_new = tries == 1 and self._looking == 0
            return await apply(
                tx,
                steps,
                None,
                ids=self._ids,
                writer=self.id,
                chain=self._chain or await self._new_chain(tx),
                as_new=as_new,
            )

        try:
            outcomes = await transact(self._db, work, hot=True)
        except CommitUnknown:
            self._chain = None  # it may or may not have moved on
            raise
        if tries > 1:
            self._looking = LOOK_AFTER_CONFLICT
        elif self._looking:
            self._looking -= 1
        return outcomes

    async def _new_chain(self, tx: Tx) -> Chain:
        chain = Chain(await _register(tx))

        def keep() -> None:
            self._chain = chain

        tx.after_commit(keep)
        return chain


async def _register(tx: Tx) -> int:
    """A number that no writer ever had."""
    number: int = await tx.fetchval(
        "UPDATE sequence SET next = next + 1 WHERE name = 'writer' RETURNING next"
    )
    return number


def _fail(batch: Iterable[_Waiting], error: Exception) -> None:
    for _, future in batch:
        if not future.done():
            future.set_exception(error)
            future.exception()  # retrieved: a caller that left must not leave a warning behind
