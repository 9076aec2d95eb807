"""Reading the configuration: one file, the environment, and what the command line adds.

``load`` returns ``Settings`` or raises ``ConfigError`` with every fault it can find, each naming
the key as it stands in the file. Later sources win: the file, then ``FAREBOX_<SECTION>__<KEY>``,
then ``overrides``. In the file ``${NAME}`` is an environment variable and ``<secret>_file`` reads
the secret from a file; relative paths count from the file's own folder. This is the only module
that looks at the environment.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from chain.networks import NETWORKS
from gateway import config_rules as rules
from gateway.sections import External, Section
from gateway.settings import (
    Chain,
    Credits,
    Facilitator,
    Server,
    Settings,
    Stripe,
    Upstream,
)

__all__ = ["ConfigError", "Settings", "environ", "load", "quick"]

_PREFIX: Final = "FAREBOX_"
_ONE: Final[dict[str, type[Section]]] = {
    "server": Server,
    "credits": Credits,
    "stripe": Stripe,
    "facilitator": Facilitator,
    "external": External,
}
_MANY: Final[dict[str, type[Section]]] = {"chains": Chain, "upstreams": Upstream}
_SECRETS: Final = {
    "server": ("database", "redis"),
    "chains": ("settler_key", "settler_keys", "facilitator_key", "refund_key"),
    "stripe": ("secret_key", "webhook_secret"),
    "facilitator": ("api_key",),
}
_GIVEN: Final = {"name", "network"}  # fields this module fills in; no keys of the file
_ENV: Final = re.compile(r"\$(\$?)\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")

M = TypeVar("M", bound=Section)
Judge = Callable[[Upstream], Iterable[tuple[str, str]]]
"""Yields (key below the upstream, what is wrong with it)."""


class ConfigError(Exception):
    """The configuration cannot be used. ``faults`` holds one sentence for each thing to mend."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))


def environ() -> Mapping[str, str]:
    """The process environment, for the commands that look at it (``NO_COLOR``)."""
    return os.environ


def load(
    path: Path | None,
    *,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    judge: Judge | None = None,
) -> Settings:
    """Settings from a file (None: no file), the environment and ``overrides``.

    ``overrides`` is shaped and spelled like the file: ``{"server": {"listen": "…"}}``. ``env``
    is the process environment unless given. ``judge`` looks at each upstream with what this layer
    does not know (price rules, path patterns) and yields faults. Raises ``ConfigError``.
    """
    reader = _Reader(os.environ if env is None else env, path, judge)
    data = reader.read_file() if path is not None else {}
    data = reader.interpolate(data, "")
    reader.merge_environment(data)
    _merge(data, overrides or {})
    return reader.settings(data)


def quick(
    upstream: str,
    price: str,
    pay_to: str,
    network: str,
    rpc: str,
    *,
    kind: str = "http",
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    judge: Judge | None = None,
) -> Settings:
    """Settings of ``farebox serve --upstream … --price …``: one upstream, one price for all of it.

    Raises ``ConfigError`` as ``load`` does.
    """
    whole = {"tools": {"*": price}} if kind == "mcp" else {"routes": [_all_routes(price)]}
    data: dict[str, Any] = {
        "chains": {network: {"rpc": [rpc], "pay_to": pay_to}},
        "upstreams": {"upstream": {"kind": kind, "url": upstream, **whole}},
    }
    _merge(data, overrides or {})
    return load(None, env=env, overrides=data, judge=judge)


def _all_routes(price: str) -> dict[str, str]:
    return {"match": "* /*", "price": price}


def _merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Deep merge of tables; anything else replaces."""
    for key, value in more.items():
        if isinstance(value, Mapping):
            table = into.get(key)
            into[key] = dict(table) if isinstance(table, Mapping) else {}
            _merge(into[key], value)
        else:
            into[key] = value


def _squash(name: str) -> str:
    return name.casefold().replace("-", "_").replace(":", "_")


def nearest(name: str, known: list[str]) -> str:
    """``; did you mean X?`` for the closest known name, or a list of all if none is close."""
    close = difflib.get_close_matches(_squash(name), known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(known))}"


def _keys(model: type[Section]) -> list[str]:
    return [f.alias or name for name, f in model.model_fields.items() if name not in _GIVEN]


class _Reader:
    """One run of ``load``: collects the faults on the way."""

    def __init__(self, env: Mapping[str, str], path: Path | None, judge: Judge | None) -> None:
        self.env = env
        self.judge = judge
        self.path = path
        self.base = (path.parent if path else Path()).resolve()
        self.faults: list[str] = []
        self.origins: dict[str, str] = {}  # key -> the environment variable it came from
        self.broken: set[str] = set()  # keys that have a fault already

    def fault(self, where: str, text: str) -> None:
        """Note the first fault of a key; ``text`` continues the key to a sentence."""
        if where in self.broken:
            return
        self.broken.add(where)
        variable = self.origins.get(where)
        colon = ":" if text.startswith("'") else ""
        self.faults.append(f"{where}{f' ({variable})' if variable else ''}{colon} {text}")

    # --- sources ----------------------------------------------------------------------------

    def read_file(self) -> dict[str, Any]:
        """The tables of the TOML file. A file that cannot be read ends the run at once."""
        assert self.path is not None  # noqa: S101  (the caller asked for a file)
        try:
            return tomllib.loads(self.path.read_text(encoding="utf-8"), parse_float=Decimal)
        except FileNotFoundError:
            raise ConfigError([f"{self.path}: no such file; `farebox init` writes one"]) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([f"{self.path}: cannot be read: {error}"]) from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError([f"{self.path}: is not valid TOML: {error}"]) from None

    def interpolate(self, value: Any, where: str) -> Any:
        """``${NAME}`` and ``${NAME:-default}`` in every text; ``$${`` stands for ``${``."""
        if isinstance(value, dict):
            return {k: self.interpolate(v, f"{where}.{k}".lstrip(".")) for k, v in value.items()}
        if isinstance(value, list):
            return [self.interpolate(v, f"{where}[{i}]") for i, v in enumerate(value)]
        if not isinstance(value, str):
            return value

        def one(found: re.Match[str]) -> str:
            escaped, name, default = found.groups()
            if escaped:
                return found.group(0)[1:]
            if name not in self.env and default is None:
                self.fault(where, f"needs the environment variable {name}, which is not set")
            return self.env.get(name, default or "")

        return _ENV.sub(one, value)

    def merge_environment(self, data: dict[str, Any]) -> None:
        """``FAREBOX_<SECTION>__<KEY>``; deeper keys by more ``__``. Lists and tables as JSON."""
        for variable in sorted(self.env):
            if not variable.startswith(_PREFIX) or "__" not in variable[len(_PREFIX) :]:
                continue
            parts = variable[len(_PREFIX) :].split("__")
            table, where = data, ""
            for depth, part in enumerate(parts):
                key = _spelling(part, table, parts[:depth])
                where = f"{where}.{key}".lstrip(".")
                if depth == len(parts) - 1:
                    self.origins[where] = variable
                    table[key] = self._env_value(where, self.env[variable])
                elif isinstance(table.setdefault(key, {}), dict):
                    table = table[key]
                else:
                    self.origins[where] = variable
                    self.fault(where, "is not a table, so it has no keys")
                    break

    def _env_value(self, where: str, text: str) -> Any:
        if not text.startswith(("[", "{")):
            return text
        try:
            return json.loads(text, parse_float=Decimal)
        except ValueError:
            self.fault(where, "should be JSON, as it begins with a bracket")
            return text

    def _read_secrets(self, section: str, where: str, table: dict[str, Any]) -> None:
        for key in _SECRETS.get(section, ()):
            named = table.pop(f"{key}_file", None)
            if named is None or named == "":
                continue
            at = f"{where}.{key}_file"
            if table.get(key):
                self.fault(at, f"is given beside {key}: keep one of the two")
                continue
            try:
                table[key] = (self.base / str(named)).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                why = error.strerror if isinstance(error, OSError) else "is not text"
                self.fault(at, f"cannot be read: {self.base / str(named)}: {why}")
                self.broken.add(f"{where}.{key}")

    # --- sections ---------------------------------------------------------------------------

    def settings(self, data: dict[str, Any]) -> Settings:
        """Check every section, then the rules between them; raise with all faults, or return."""
        known = [*_ONE, *_MANY]
        for key in [k for k in data if k not in known]:
            self.fault(key, f"is not a section{nearest(key, known)}")
        server = self._section(Server, "server", "server", self._table(data, "server"))
        credit = self._section(Credits, "credits", "credits", self._table(data, "credits"))
        stripe = self._section(Stripe, "stripe", "stripe", self._table(data, "stripe"))
        table = self._table(data, "facilitator")
        facilitator = self._section(Facilitator, "facilitator", "facilitator", table)
        external = self._section(External, "external", "external", self._table(data, "external"))
        chains = tuple(self._chains(self._table(data, "chains"), credit))
        upstreams = tuple(self._upstreams(self._table(data, "upstreams")))
        parts = rules.Parts(server, credit, chains, stripe, upstreams, self.base)
        for keys, text in rules.faults(parts, self._tables_left_out(data)):
            if not any(self._is_broken(key) for key in keys):
                self.fault(keys[0], text)
        if None in (server, credit, stripe, facilitator, external) or self.faults:
            raise ConfigError(self.faults)
        assert server and credit and stripe  # noqa: S101  (for the type checker)
        assert facilitator and external  # noqa: S101
        return Settings(
            server=rules.complete_server(server, self.base),
            credits=credit,
            chains=chains,
            stripe=stripe,
            facilitator=facilitator,
            external=external,
            upstreams=upstreams,
            source=self.path,
        )

    def _is_broken(self, key: str) -> bool:
        """A rule is silent about keys that already have a fault of their own, inside or around."""
        return any(b == key or b.startswith((f"{key}.", f"{key}[")) for b in self.broken)

    def _tables_left_out(self, data: Mapping[str, Any]) -> frozenset[str]:
        return frozenset(name for name in _MANY if not data.get(name))

    def _table(self, data: Mapping[str, Any], name: str) -> dict[str, Any]:
        value = data.get(name, {})
        if isinstance(value, dict):
            return dict(value)
        self.fault(name, f"should be a table: [{name}]")
        return {}

    def _named(self, section: str, tables: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, value in tables.items():
            where = f"{section}.{name}"
            if not isinstance(value, dict):
                self.fault(where, f"should be a table: [{where}]")
            elif not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_:-]{0,63}", name):
                self.fault(where, "should have a name of letters, digits, '-' and '_'")
            else:
                for key in sorted(_GIVEN & value.keys()):
                    self.fault(f"{where}.{key}", f"is not a key of [{where}]")
                yield name, {k: v for k, v in value.items() if k not in _GIVEN}

    def _chains(self, tables: dict[str, Any], credit: Credits | None) -> Iterator[Chain]:
        for name, table in self._named("chains", tables):
            where = f"chains.{name}"
            found = rules.network_of(name, table.pop("assets", None))
            if isinstance(found, rules.Fault):
                self.fault(f"{where}{found.key}", found.text)
                table["network"] = next(iter(NETWORKS.values()))  # to look at the other keys
            else:
                table["network"] = found
            if "min_onchain" not in table and credit is not None:
                table["min_onchain"] = rules.inherited_min_onchain(credit)
            chain = self._section(Chain, "chains", where, table, name=name)
            if chain is not None:
                yield chain

    def _upstreams(self, tables: dict[str, Any]) -> Iterator[Upstream]:
        for name, table in self._named("upstreams", tables):
            where = f"upstreams.{name}"
            upstream = self._section(Upstream, "upstreams", where, table, name=name)
            if upstream is not None:
                for key, text in self.judge(upstream) if self.judge else ():
                    self.fault(f"{where}.{key}", text)
                yield upstream

    def _section(
        self, model: type[M], section: str, where: str, table: dict[str, Any], **given: str
    ) -> M | None:
        """One section, or what is left of it without its faulty keys (for the rules between)."""
        self._read_secrets(section, where, table)
        try:
            return model.model_validate({**table, **given})
        except ValidationError as error:
            details = error.errors(include_url=False, include_context=True)
        for detail in details:
            if detail["type"] != "none_required":
                self._explain(model, where, table, detail)
        faulty = {str(d["loc"][0]) for d in details if d["loc"]}
        rest = {k: v for k, v in table.items() if k not in faulty}
        try:
            return model.model_validate({**rest, **given})
        except ValidationError:
            return None

    def _explain(
        self, model: type[Section], where: str, table: dict[str, Any], detail: ErrorDetails
    ) -> None:
        at = where + _place(table, detail)
        context = detail.get("ctx", {})
        match detail["type"]:
            case "missing":
                text = "is missing"
            case "extra_forbidden":
                key = str(detail["loc"][-1])
                inner = rules.model_at(model, detail["loc"][:-1])
                text = f"is not a key of [{at.rpartition('.')[0]}]{nearest(key, _keys(inner))}"
            case "value_error":
                text = str(context.get("error", detail["msg"]))
            case "greater_than_equal":
                text = f"should be at least {context['ge']}"
            case "less_than_equal":
                text = f"should be at most {context['le']}"
            case "literal_error":
                text = f"should be {context['expected']}"
            case "string_type" | "path_type":
                text = "should be text in quotes"
            case "bool_type" | "bool_parsing":
                text = "should be true or false"
            case "tuple_type" | "list_type":
                text = "should be a list"
            case "model_type" | "model_attributes_type":
                text = "should be a table"
            case "too_short" | "string_too_short":
                text = "should not be empty"
            case _:
                text = f"is wrong: {detail['msg']}"
        self.fault(at, text)


def _spelling(part: str, table: Mapping[str, Any], above: list[str]) -> str:
    """The key an upper-case part of a variable means: one that is there, a network, or itself."""
    known = list(table)
    if [_squash(a) for a in above] == ["chains"]:
        known += list(NETWORKS)
    same = [key for key in known if _squash(key) == _squash(part)]
    return same[0] if same else part.casefold()


def _place(table: Mapping[str, Any], detail: ErrorDetails) -> str:
    """Where in a section an error is, as a person would write it: ``.routes[2].price``.

    Pydantic's location also names members of unions and the pairs a table was turned into;
    these are left out.
    """
    here: Any = table
    place = ""
    parts = list(detail["loc"])
    while parts:
        part = parts.pop(0)
        if isinstance(part, int) and isinstance(here, Mapping):
            key = list(here)[part]
            place, here = f"{place}.{key}", here[key]
            parts = parts[1:]  # the index in the pair (key, value)
        elif isinstance(part, int) and isinstance(here, (list, tuple)):
            place, here = f"{place}[{part}]", here[part]
        elif isinstance(here, Mapping) and part in here:
            place, here = f"{place}.{part}", here[part]
        elif not parts and detail["type"] == "missing":
            place = f"{place}.{part}"
    return place
