"""Stripe's error object: ``{"error": {"type", "code", "message", "param", …}}``.

Source: Stripe API reference, "Errors". ``StripeError`` is raised anywhere in the fake and turned
into the answer in one place (``app.py``).
"""

from __future__ import annotations

from typing import Any


class StripeError(Exception):
    """An answer of status 4xx or 5xx in Stripe's form.

    ``started``: the endpoint had begun its work, so the answer is kept under the idempotency key.
    Stripe keeps no answer for parameters that fail validation.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        started: bool = False,
        **extra: Any,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.code = code
        self.param = param
        self.started = started
        self.extra = extra

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        error: dict[str, Any] = {"message": self.message, "type": self.kind}
        if self.code is not None:
            error["code"] = self.code
            error["doc_url"] = "https://stripe.com/docs/error-codes/" + self.code.replace("_", "-")
        if self.param is not None:
            error["param"] = self.param
        error.update({key: value for key, value in self.extra.items() if value is not None})
        return {"error": error}


def invalid(message: str, param: str | None = None, code: str | None = None) -> StripeError:
    """400 ``invalid_request_error``: the parameters are wrong and nothing was begun."""
    return StripeError(400, "invalid_request_error", message, code=code, param=param)


def missing(kind: str, object_id: str, param: str = "id") -> StripeError:
    """404 ``resource_missing``."""
    return StripeError(
        404,
        "invalid_request_error",
        f"No such {kind}: '{object_id}'",
        code="resource_missing",
        param=param,
    )
