"""Farebox: a payment gateway that stands in front of an HTTP API or an MCP server."""

__version__ = "0.1.0"
