"""What all sections of the settings share, and one that stands alone; the rest: ``settings.py``."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from gateway.forms import Count, Units


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
