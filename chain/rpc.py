"""JSON-RPC to the nodes of one network.

Plain aiohttp rather than web3's provider: the deadline, the chain-id check, the failover rule and
the error mapping are the whole point here, and a purchase needs eight methods.

Reads go to one URL after the other until one answers, and round again after a short pause, inside
one deadline. A send goes out once: the next URL is tried only when it is certain that nothing left
this machine. Every connection is asked for its chain id before its answers count, because a
provider's load balancer, a mistyped URL or a restarted local chain can put another network behind
the same address. Whether the URLs tell the same chain is asked by ``survey`` (chain/survey.py);
which of them to ask first, and when not to, is in chain/endpoints.py.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from chain.endpoints import Endpoint, jittered, retry_after_ms
from chain.endpoints import now_ms as _now_ms
from chain.errors import NodeError, Reverted, Unavailable, Unknown
from chain.eth import count, data_bytes, quantity, read_string
from chain.networks import Network
from wallet_auth.keys import keccak256
from wallet_auth.strict import json_object

if TYPE_CHECKING:
    import aiohttp

MAX_ANSWER_BYTES: Final = 16 * 1024 * 1024
ROUNDS: Final = 3  # over all URLs, of a read that none of them would take
PAUSE_MS: Final = 100  # before the second round; doubled before the third
_PASSING: Final = frozenset({"rpc_unreachable", "rpc_no_answer", "rpc_rate_limited"})
CODE_CACHE_MS: Final = 15 * 60 * 1_000
_ERROR_STRING: Final = bytes.fromhex("08c379a0")  # Error(string)
# "Limit exceeded" of EIP-1474, and what providers in use say instead.
_RATE_LIMITS: Final = frozenset({-32005, -32016, -32029, 429})
_SAID_REVERT: Final = re.compile(r"(?:execution )?reverted(?:: (?P<reason>.+))?", re.DOTALL)
# A call that ended badly without REVERT, in the words of geth ("out of gas") and of revm.
_SAID_HALT: Final = re.compile(
    r"out ?of ?gas|gas required exceeds allowance|EVM error|invalid opcode|invalid jump|stack "
    r"(?:under|over)flow",
    re.IGNORECASE,
)


class Rpc:
    """A client for one network over several URLs, first URL preferred.

    Belongs to the event loop it is first used in; ``close`` it there. ``timeout_s`` is the whole
    time one call may take, over all URLs together.
    """

    def __init__(self, network: Network, urls: Sequence[str], *, timeout_s: int = 10) -> None:
        if not urls:
            raise ValueError("at least one RPC URL is needed")
        self.network = network
        self.timeout_ms = timeout_s * 1_000
        self.endpoints = tuple(Endpoint.of(url) for url in urls)
        self._session: aiohttp.ClientSession | None = None
        self._closed = False
        # Addresses known to hold code. Bounded: only tokens of the networks table are asked for.
        self._code_until_ms: dict[str, int] = {}

    # -- asking ----------------------------------------------------------------------------------

    async def call(self, method: str, params: Sequence[Any]) -> Any:
        """The ``result`` of a read. Raises ``Reverted``, ``NodeError`` or ``Unavailable``."""
        deadline_ms = _now_ms() + self.timeout_ms
        for turn in range(ROUNDS):
            try:
                return await self._round(method, params, deadline_ms)
            except Unavailable as error:
                pause_ms = self._pause_ms(turn)
                passing = error.code in _PASSING and turn + 1 < ROUNDS
                if not passing or _now_ms() + pause_ms >= deadline_ms:
                    raise
            await asyncio.sleep(pause_ms / 1_000)
        raise AssertionError("the last round returns or raises")

    def _pause_ms(self, turn: int) -> int:
        """Until some URL wants to be asked again: at once, or when its refusal is over."""
        earliest_ms = min(e.refused_until_ms for e in self.endpoints)
        return max(jittered(PAUSE_MS << turn), earliest_ms - _now_ms())

    async def _round(self, method: str, params: Sequence[Any], deadline_ms: int) -> Any:
        """Each URL that may be asked, once."""
        order = self._order()
        last: Unavailable | None = None
        for i, endpoint in enumerate(order):
            # An equal share of what is left, so that one silent URL cannot use up the deadline.
            share_ms = (deadline_ms - _now_ms()) // (len(order) - i)
            try:
                return await self._ask(endpoint, method, params, share_ms)
            except Unavailable as error:
                last = error
        if last is None:
            now_ms = _now_ms()
            if any(e.refused_until_ms > now_ms for e in self.endpoints):
                raise Unavailable("rpc_rate_limited", "every provider asked to be left alone")
            raise Unavailable("rpc_resting", "every provider is failing; one question tries them")
        raise last

    async def call_each(self, method: str, params: Sequence[Any], at_most: int) -> list[Any]:
        """The results of up to ``at_most`` URLs, at least one; for questions worth asking twice.

        A URL that has just failed is left out: the second opinion must not cost its timeout again.
        """
        now_ms = _now_ms()
        asked = [e for e in self._order() if not e.resting(now_ms)][:at_most]
        good = [
            result
            for _, result in await self.ask_all(method, params, asked)
            if not isinstance(result, Unavailable)
        ]
        return good or [await self.call(method, params)]

    async def ask_all(
        self, method: str, params: Sequence[Any], asked: Sequence[Endpoint] | None = None
    ) -> list[tuple[Endpoint, Any]]:
        """What every URL (or each of ``asked``) says, within half the deadline: its result, or the
        ``Unavailable`` it was. Raises ``Reverted`` if one of them says so.
        """
        chosen = [e for e in self.endpoints if not self._spared(e)] if asked is None else asked
        results = await asyncio.gather(
            *(self._ask(e, method, params, self.timeout_ms // 2) for e in chosen),
            return_exceptions=True,
        )
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, Unavailable):
                raise result
        return list(zip(chosen, results, strict=True))

    async def eth_call(
        self,
        to: str,
        data: bytes,
        block: str = "latest",
        *,
        gas: int | None = None,
        sender: str | None = None,
    ) -> bytes:
        """What a call returns at ``block``. ``gas`` caps it, for code we do not trust. ``sender``:
        who makes it, where that matters."""
        tx: dict[str, str] = {"to": to, "data": "0x" + data.hex()}
        if sender is not None:
            tx["from"] = sender
        if gas is not None:
            tx["gas"] = hex(gas)
        return self.data(await self.call("eth_call", [tx, block]))

    async def code(self, address: str, block: str = "latest") -> bytes:
        """The code at an address; empty if it has none."""
        return self.data(await self.call("eth_getCode", [address, block]))

    async def has_code(self, address: str) -> bool:
        """Whether a token of the networks table is deployed; a yes is kept for 15 minutes."""
        if self._code_until_ms.get(address, 0) > _now_ms():
            return True
        found = bool(await self.code(address))
        if found:
            self._code_until_ms[address] = _now_ms() + CODE_CACHE_MS
        return found

    async def block_number(self) -> int:
        """The number of the newest block."""
        return self.count(await self.call("eth_blockNumber", []))

    async def check_chain_id(self) -> None:
        """Ask every URL for its chain id. ``Unavailable`` names the first that is wrong or down."""
        for endpoint in self.endpoints:
            try:
                await self._within(self._verify(endpoint), endpoint, self.timeout_ms)
            except Unavailable:
                endpoint.failed()
                raise

    async def send_raw(self, raw: bytes) -> None:
        """Hand over a signed transaction, once.

        Returns when a node took it. ``NodeError``: a node answered and refused. ``Unavailable``:
        nothing left this machine. ``Unknown``: it may have arrived.
        """
        tx_hash = "0x" + keccak256(raw).hex()
        order = self._order(spare=False)
        for endpoint in order:
            last = endpoint is order[-1]
            if not endpoint.verified:
                try:
                    await self._within(self._verify(endpoint), endpoint, self.timeout_ms)
                except Unavailable as error:
                    endpoint.failed()
                    if last:
                        raise Unavailable(error.code, error.detail) from None
                    continue
            try:
                answer = await self._within(
                    self._post(endpoint, "eth_sendRawTransaction", ["0x" + raw.hex()]),
                    endpoint,
                    self.timeout_ms,
                    sending=tx_hash,
                )
            except NodeError:
                raise
            except Unavailable:
                endpoint.failed()
                if last:
                    raise
                continue
            if answer != tx_hash:
                detail = f"{endpoint.label} answered with another transaction hash"
                raise Unknown("rpc_bad_answer", detail, tx_hash)
            return

    async def close(self) -> None:
        """Close the connections, for good: a question still under way must open none again."""
        self._closed = True
        if self._session is not None:
            await self._session.close()
            self._session = None

    # -- reading answers -------------------------------------------------------------------------

    @staticmethod
    def quantity(value: object) -> int:
        """A quantity out of an answer; ``Unavailable`` if the node sent something else."""
        try:
            return quantity(value)
        except ValueError as error:
            raise Unavailable("rpc_bad_answer", str(error)) from None

    @staticmethod
    def count(value: object) -> int:
        """The same of what is counted: below 2**63."""
        try:
            return count(value)
        except ValueError as error:
            raise Unavailable("rpc_bad_answer", str(error)) from None

    @staticmethod
    def data(value: object) -> bytes:
        """Bytes out of an answer; ``Unavailable`` if the node sent something else."""
        try:
            return data_bytes(value)
        except ValueError as error:
            raise Unavailable("rpc_bad_answer", str(error)) from None

    # -- one URL ---------------------------------------------------------------------------------

    def _order(self, *, spare: bool = True) -> list[Endpoint]:
        """Whom to ask, best first: as configured, but for those that fail, lag or disagree.

        ``spare``: without those whose breaker is open while a question tries them, and those that
        asked to be left alone.
        """
        now_ms = _now_ms()
        asked = [e for e in self.endpoints if not (spare and self._spared(e))]
        return sorted(asked, key=lambda e: (e.resting(now_ms), e.suspect is not None))

    @staticmethod
    def _spared(endpoint: Endpoint) -> bool:
        now_ms = _now_ms()
        tried = endpoint.broken(now_ms) and endpoint.probing > 0
        return tried or endpoint.refused_until_ms > now_ms

    async def _ask(
        self, endpoint: Endpoint, method: str, params: Sequence[Any], limit_ms: int
    ) -> Any:
        """One question to one URL, noting what it says of the URL."""

        async def asked() -> Any:
            if not endpoint.verified:
                await self._verify(endpoint)
            result = await self._post(endpoint, method, params)
            if not endpoint.verified:  # the connection was remade underneath this very question
                await self._verify(endpoint)
            return result

        endpoint.probing += 1
        try:
            result = await self._within(asked(), endpoint, limit_ms)
        except (NodeError, Reverted):
            endpoint.answered()
            raise
        except Unavailable as error:
            if error.code != "rpc_rate_limited":
                endpoint.failed()
            raise
        finally:
            endpoint.probing -= 1
        endpoint.answered()
        return result

    async def _verify(self, endpoint: Endpoint) -> None:
        found = self.quantity(await self._post(endpoint, "eth_chainId", []))
        # Not only for a new connection: who has once told another chain is asked before it is
        # believed again.
        endpoint.verified = found == self.network.chain_id
        if not endpoint.verified:
            raise Unavailable(
                "rpc_wrong_chain",
                f"{endpoint.label} serves chain {found}, expected {self.network.chain_id}",
            )

    async def _within(
        self, work: Any, endpoint: Endpoint, limit_ms: int, *, sending: str | None = None
    ) -> Any:
        """Run ``work`` against a deadline and turn transport faults into our errors."""
        import aiohttp

        try:
            async with asyncio.timeout(max(limit_ms, 1) / 1_000):
                return await work
        except aiohttp.ClientConnectorError:
            # No connection was made, so nothing was written: safe to go on, even when sending.
            raise Unavailable("rpc_unreachable", f"cannot connect to {endpoint.label}") from None
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            endpoint.verified = False
            detail = f"{endpoint.label}: {type(error).__name__}"
            if sending is not None:
                raise Unknown("rpc_no_answer", detail, sending) from None
            raise Unavailable("rpc_no_answer", detail) from None
        except _BadAnswer as error:
            detail = f"{endpoint.label}: {error}"
            if sending is not None and not error.refused:
                raise Unknown("rpc_bad_answer", detail, sending) from None
            if error.refused:
                endpoint.refused(error.for_ms)
            code = "rpc_rate_limited" if error.refused else "rpc_bad_answer"
            raise Unavailable(code, detail) from None

    async def _post(self, endpoint: Endpoint, method: str, params: Sequence[Any]) -> Any:
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": list(params)})
        async with self._http().post(
            endpoint.url,
            data=body,
            headers={"content-type": "application/json"},
            allow_redirects=False,
            trace_request_ctx=endpoint,
        ) as response:
            if response.status in (401, 403, 429):
                for_ms = retry_after_ms(response.headers.get("Retry-After"))
                raise _BadAnswer(f"HTTP {response.status}", refused=True, for_ms=for_ms)
            raw = await response.content.read(MAX_ANSWER_BYTES + 1)
            while len(raw) <= MAX_ANSWER_BYTES and not response.content.at_eof():
                raw += await response.content.read(MAX_ANSWER_BYTES + 1 - len(raw))
            if len(raw) > MAX_ANSWER_BYTES:
                raise _BadAnswer("the answer is too long")
            return _result(raw, response.status)

    def _http(self) -> aiohttp.ClientSession:
        if self._closed:
            raise Unavailable("rpc_closed", "this process is stopping")
        if self._session is None:
            import aiohttp

            trace = aiohttp.TraceConfig()
            trace.on_connection_create_end.append(_connection_made)
            self._session = aiohttp.ClientSession(
                cookie_jar=aiohttp.DummyCookieJar(), trace_configs=[trace]
            )
        return self._session


class _BadAnswer(Exception):  # noqa: N818
    """Not JSON-RPC. ``refused``: the provider turned the request away without looking at it, and
    asked not to be asked again for ``for_ms``."""

    def __init__(self, detail: str, *, refused: bool = False, for_ms: int | None = None) -> None:
        super().__init__(detail)
        self.refused = refused
        self.for_ms = for_ms


async def _connection_made(_session: object, context: Any, _params: object) -> None:
    context.trace_request_ctx.verified = False


def _result(raw: bytes, status: int) -> Any:
    try:
        answer = json_object(raw, floats=False)  # the protocol writes every number as text
    except ValueError as fault:
        raise _BadAnswer(f"HTTP {status}, {fault}") from None
    error = answer.get("error")
    if isinstance(error, dict):
        raise _node_error(error)
    if status != 200 or "result" not in answer:
        raise _BadAnswer(f"HTTP {status}, without a result")
    return answer["result"]


def _node_error(error: dict[str, Any]) -> NodeError | Reverted | _BadAnswer:
    code = error.get("code")
    message = str(error.get("message", ""))
    if code in _RATE_LIMITS:
        return _BadAnswer(message[:200], refused=True)
    data = error.get("data")
    if isinstance(data, dict):  # some nodes wrap it once more
        data = data.get("data")
    said = _SAID_REVERT.search(message)
    if code == 3 or said is not None or _SAID_HALT.search(message) is not None:
        try:
            raw = data_bytes(data) if data is not None else b""
        except ValueError:
            raw = b""
        return Reverted(_revert_reason(raw) or (said["reason"] or "" if said else ""), raw)
    return NodeError(code if isinstance(code, int) else 0, message)


def _revert_reason(data: bytes) -> str:
    if data[:4] != _ERROR_STRING:
        return ""
    try:
        return read_string(data[4:])
    except ValueError:
        return ""
