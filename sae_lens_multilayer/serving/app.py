"""The HTTP interface of the page: the page itself, and jobs.

The page can run a model on a reader's machine, so other web sites must not reach it:
requests must have a known `Host` (against DNS rebinding) and, if they have an `Origin`,
this one; jobs must be JSON, which other sites cannot send without permission; and there
are no CORS headers that permit it.
"""

from collections.abc import Iterable
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from sae_lens_multilayer.serving.explorer import Explorer
from sae_lens_multilayer.serving.explorer import Request as JobRequest
from sae_lens_multilayer.serving.jobs import BusyError, Jobs

_MAX_BYTES = 2**16
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_REQUEST: TypeAdapter[JobRequest] = TypeAdapter(
    Annotated[JobRequest, Field(discriminator="kind")]
)


def make_app(page: str, explorer: Explorer, hosts: Iterable[str]) -> Starlette:
    """The application that serves a page.

    Args:
        page: `report_html(..., served=True)`.
        explorer: Runs the jobs.
        hosts: Names and addresses under which the page may be opened.
    """
    jobs = Jobs()

    async def show(request: Request) -> Response:
        del request
        return HTMLResponse(page, headers=_HEADERS)

    async def start(request: Request) -> Response:
        kind = request.headers.get("content-type", "").split(";")[0].strip()
        if kind != "application/json":
            return _error(415, "A job must be application/json.")
        body = await _body(request)
        if body is None:
            return _error(413, f"A job may have {_MAX_BYTES:,} bytes.")
        try:
            wanted = _REQUEST.validate_json(body)
            explorer.check(wanted)
            job = jobs.start(lambda progress: explorer.run(wanted, progress))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"][1:]))
            return _error(400, f"{where or 'kind'}: {first['msg']}")
        except ValueError as error:
            return _error(400, str(error))
        except BusyError:
            return _error(409, "Another job is running; wait for it or cancel it.")
        return JSONResponse(job.as_json(), 202, headers=_HEADERS)

    async def follow(request: Request) -> Response:
        job = jobs.find(request.path_params["job_id"])
        if job is None:
            return _error(404, "There is no such job.")
        if request.method == "DELETE":
            job.cancel.set()
        return JSONResponse(job.as_json(), headers=_HEADERS)

    routes = [
        Route("/", show),
        Route("/jobs", start, methods=["POST"]),
        Route("/jobs/{job_id:int}", follow, methods=["GET", "DELETE"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(_KnownHosts, hosts=hosts)])


class _KnownHosts:
    """Refuses requests under another `Host`, or from a page of another `Origin`."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str]) -> None:
        self._app, self._hosts = app, {host.lower().strip("[]") for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Request(scope).headers
            host, origin = headers.get("host", ""), headers.get("origin")
            is_own = origin in (None, f"http://{host}", f"https://{host}")
            if _name_of(host) not in self._hosts or not is_own:
                refused = PlainTextResponse("Unknown host or origin.\n", 403)
                await refused(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _name_of(host: str) -> str | None:
    """The name or address in a `Host` header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


async def _body(request: Request) -> bytes | None:
    """The body of a request; None if it is too long."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BYTES:
            return None
    return body


def _error(status: int, message: Any) -> Response:
    return JSONResponse({"error": str(message)}, status, headers=_HEADERS)
