"""The page's server: static files for everybody, the rest for who brings an annotator's token."""

import hmac
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stages.label.people.desk import Choice, Desk
from stages.label.people.overview import overview
from stages.label.people.render import as_turns

PAGE = Path(__file__).parent / "page"
_LARGEST_REQUEST = 4096  # bytes
# Only the page's own files load, and nothing of what it shows runs, loads, leads elsewhere or is framed.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}

Change = Literal["answers", "end"]
Handler = Callable[[Request, str], Awaitable[Response]]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    key: str
    choice: Choice


class _Undo(BaseModel):
    model_config = ConfigDict(extra="forbid")
    key: str | None  # of the task that the page shows: an undo that is sent twice goes back once


@dataclass(frozen=True)
class _Api:
    """What an annotator may ask for; every handler is given who asks."""

    desk: Desk
    tokens: Mapping[str, str]
    changed: Callable[[Change], None]

    @property
    def lead(self) -> str:
        """Who sees everybody's progress and ends the labelling."""
        return next(iter(self.tokens))

    def route(self, path: str, handler: Handler, *, method: str = "GET") -> Route:
        """A route to who brings a token; others, and requests that the page does not make, are refused."""

        async def checked(request: Request) -> Response:
            name = self._annotator(request.headers.get("authorization", ""))
            if name is None:
                return JSONResponse({"error": "no such link"}, 401)
            if int(request.headers.get("content-length") or 0) > _LARGEST_REQUEST:
                return JSONResponse({"error": "too large"}, 413)
            try:
                return await handler(request, name)
            except ValidationError:
                return JSONResponse({"error": "not a request of this page"}, 400)

        return Route(path, checked, methods=[method])

    async def task(self, _: Request, name: str) -> Response:
        return self._shown(name)

    async def answer(self, request: Request, name: str) -> Response:
        said = _Answer.model_validate_json(await request.body())
        taken = self.desk.answer(name, said.key, said.choice)
        self.changed("answers")
        return self._shown(name, 200 if taken else 409)

    async def undo(self, request: Request, name: str) -> Response:
        said = _Undo.model_validate_json(await request.body())
        current = self.desk.next_task(name)
        if said.key == (current.key if current else None):
            self.desk.undo(name)
            self.changed("answers")
        return self._shown(name)

    async def overview(self, _: Request, name: str) -> Response:
        return JSONResponse(overview(self.desk)) if name == self.lead else JSONResponse({"error": "not yours"}, 403)

    async def end(self, _: Request, name: str) -> Response:
        if name != self.lead:
            return JSONResponse({"error": "not yours"}, 403)
        if not any(not answer.skipped for answers in self.desk.answers().values() for answer in answers):
            return JSONResponse({"error": "Nothing is labelled yet; label a pair first."}, 409)
        self.changed("end")
        return JSONResponse({})

    def _annotator(self, authorization: str) -> str | None:
        given = authorization.encode()
        for name, token in self.tokens.items():
            if hmac.compare_digest(given, f"Bearer {token}".encode()):
                return name
        return None

    def _shown(self, name: str, status: int = 200) -> Response:
        """What the annotator's page shows now."""
        task = self.desk.next_task(name)
        view: dict[str, Any] = {"annotator": name, "lead": name == self.lead, "task": None}
        if task is not None:
            left, right = task.shown
            texts = {"prompt": as_turns(task.pair.prompt), "left": as_turns(left), "right": as_turns(right)}
            view["task"] = {"key": task.key, **texts}
        view |= {"can_undo": self.desk.can_undo(name), "progress": asdict(self.desk.progress(name))}
        return JSONResponse(view, status)


def build_app(desk: Desk, tokens: Mapping[str, str], *, changed: Callable[[Change], None]) -> Starlette:
    """The application; `tokens` by annotator, the first of whom leads. `changed` is told of answers and of the end.

    The desk is used by one thread alone: the one that runs this application.
    """
    api = _Api(desk, tokens, changed)
    routes = [
        api.route("/api/task", api.task),
        api.route("/api/answer", api.answer, method="POST"),
        api.route("/api/undo", api.undo, method="POST"),
        api.route("/api/overview", api.overview),
        api.route("/api/end", api.end, method="POST"),
        Mount("/", StaticFiles(directory=PAGE, html=True)),
    ]
    return Starlette(routes=routes, middleware=[Middleware(_WithHeaders)])


class _WithHeaders:
    """Puts the security headers on every response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in _HEADERS.items())]
            await send(message)

        await self.app(scope, receive, sending)
