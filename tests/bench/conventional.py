"""The conventional peer: prepaid credits as one would plainly write them.

eth_account recovers the signer of an EIP-191 text, Redis remembers the nonce, async SQLAlchemy
debits under a row lock, writes an entry and commits before the answer. The upstream's answer is
made in the process, as for P-spend.
"""

from __future__ import annotations

from hashlib import sha256

from eth_account import Account
from eth_account.messages import encode_defunct
from redis.asyncio import Redis
from sqlalchemy import BigInteger, select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.bench.servers import ANSWER

PRICE_UNITS = 100
NONCE_KEPT_S = 600


class Base(DeclarativeBase):
    """The peer's tables."""


class Balance(Base):
    """What an address may spend."""

    __tablename__ = "peer_balance"
    address: Mapped[str] = mapped_column(primary_key=True)
    units: Mapped[int] = mapped_column(BigInteger)


class Entry(Base):
    """One debit."""

    __tablename__ = "peer_entry"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    address: Mapped[str]
    nonce: Mapped[str]
    units: Mapped[int] = mapped_column(BigInteger)


def text_of(method: str, path: str, body: bytes, nonce: str) -> str:
    """What its customers sign."""
    return f"{method} {path}\n{sha256(body).hexdigest()}\n{nonce}"


def app(database: str, redis_url: str) -> Starlette:
    """The peer, on PostgreSQL and Redis."""
    engine = create_async_engine(
        database.replace("postgresql://", "postgresql+asyncpg://"), pool_size=16, max_overflow=16
    )
    session = async_sessionmaker(engine, expire_on_commit=False)
    redis = Redis.from_url(redis_url)

    async def echo(request: Request) -> Response:
        body = await request.body()
        nonce = request.headers["x-nonce"]
        text = text_of(request.method, request.url.path, body, nonce)
        signature = request.headers["x-signature"]
        address = Account.recover_message(encode_defunct(text=text), signature=signature).lower()
        if not await redis.set(f"nonce:{address}:{nonce}", 1, nx=True, ex=NONCE_KEPT_S):
            return JSONResponse({"error": "replay"}, 409)
        async with session() as db, db.begin():
            query = select(Balance).where(Balance.address == address).with_for_update()
            row = (await db.execute(query)).scalar_one_or_none()
            if row is None or row.units < PRICE_UNITS:
                return JSONResponse({"error": "not enough credits"}, 402)
            row.units -= PRICE_UNITS
            db.add(Entry(address=address, nonce=nonce, units=-PRICE_UNITS))
        return Response(ANSWER, media_type="application/json")

    async def fund(request: Request) -> Response:
        """Set-up: make the tables and give these addresses credits."""
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with session() as db, db.begin():
            db.add_all(Balance(address=each, units=10**15) for each in await request.json())
        return JSONResponse({"ok": True})

    return Starlette(
        routes=[
            Route("/v1/echo", echo, methods=["POST"]),
            Route("/fund", fund, methods=["POST"]),
        ]
    )
