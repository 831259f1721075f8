"""Gives every request a visit, which ends with it: however it ended, and however long its stream was.

Handlers begin the visit when they take the model (`server.api.deps.take_model`); so a request that only uploads, or is
refused, keeps no model awake.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from server.door import Door, Visit

VISIT = "visit"  # key of the scope


class Presence:
    """Middleware around all that may use the model."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app = app
        self.door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection event."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope[VISIT] = visit = Visit(self.door)  # not a copy: `RequestContext` reads the route from it afterwards
        try:
            await self.app(scope, receive, send)
        finally:
            visit.end()
