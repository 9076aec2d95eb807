"""What all sections of the settings share, and some smaller ones; the rest: ``settings.py``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from gateway.forms import Count, Json, JsonTable, Units


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys, nothing secret in an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        arbitrary_types_allowed=True,
        validate_default=False,
    )


class External(Section):
    """``[external]``: the wallet API that agents speak elsewhere, under ``/api/external``."""

    session_limit_units: Annotated[Units, Field(ge=1)] = Field(5_000_000, alias="session_limit")
    """Most that the published signatures of one session may spend."""
    sessions_per_min: Annotated[Count, Field(ge=1)] = 60
    """Session nonces that one address may ask for in a minute."""
    wallet_maker: bool = False
    """Whether ``agentaddress`` makes wallets. Whoever serves it sees their keys."""


class Bazaar(Section):
    """``bazaar`` of a route: how it is called, for x402's catalogs. Examples and JSON Schemas."""

    path: JsonTable = Field(default_factory=dict)
    """Examples of the ``[names]`` in the path."""
    query: JsonTable = Field(default_factory=dict)
    query_schema: JsonTable | None = None
    body: Json | None = None
    body_schema: JsonTable | None = None
    body_type: Literal["json", "form-data", "text"] = "json"
    output: Json | None = None
    output_schema: JsonTable | None = None
    output_type: str = Field("json", max_length=40)
