"""The application: routes, errors in OpenAI's form, start and end of the engine's thread."""

import asyncio
import contextlib
import functools
from collections.abc import Callable, Collection
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from pangea_jax.generate.engine import Engine
from pangea_jax.serving import faults
from pangea_jax.serving.engine_loop import EngineLoop
from pangea_jax.serving.faults import Fault
from pangea_jax.serving.guard import Guard
from pangea_jax.serving.inputs import Inputs, Limits
from pangea_jax.serving.meters import Meters
from pangea_jax.serving.protocol import ChatRequest, CompletionRequest
from pangea_jax.serving.service import Answering, Chat, Completions, Service

# Requests that may be open beside those with a place: bodies that arrive, health checks.
_BESIDE = 64


def make(
    engine: Engine,
    name: str,
    limits: Limits,
    *,
    rows: int,
    chunk: int | None = 512,
    key: str | None = None,
    hosts: Collection[str] | None = None,
    fetch: Callable[[str], bytes] | None = None,
    temperature: float = 0.0,
    page: APIRouter | None = None,
    on_broken: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The ASGI application of one engine. It starts and ends the engine's thread with its lifespan.

    It has many parameters, because each of them is a decision of the server's owner.

    Args:
      name: of the model in requests.
      rows: answers at once.
      chunk: see `batching.run`.
      key, hosts: see `Guard`.
      fetch: see `Inputs`.
      temperature: of requests that give none.
      page: serves `/`, the page to try the model.
      on_broken: called if the engine has failed too often.
    """
    meters = Meters(rows)
    loop = EngineLoop(
        engine,
        limits,
        rows=rows,
        chunk=chunk,
        on_step=meters.step,
        on_broken=on_broken,
    )
    inputs = Inputs(engine, limits, fetch)
    service = Service(name, loop, inputs, limits, meters, temperature)

    @contextlib.asynccontextmanager
    async def lifespan(_):
        loop.start()
        yield
        inputs.close()
        await asyncio.to_thread(loop.close)

    # Their pages would load scripts of other hosts.
    app = FastAPI(title=f"pangea_jax: {name}", lifespan=lifespan, docs_url=None, redoc_url=None)
    most = rows + limits.waiting + _BESIDE
    app.add_middleware(Guard, limits=limits, meters=meters, most=most, key=key, hosts=hosts)
    app.add_exception_handler(Fault, _tell)
    app.add_exception_handler(RequestValidationError, _tell_invalid)
    app.add_exception_handler(HTTPException, _tell_http)
    _add_routes(app, service)
    if page is not None:
        app.include_router(page)
    return app


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {"type": "object", "required": ["message", "type", "param", "code"]},
    },
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": said, "content": {"application/json": {"schema": _ERROR}}}
    for status, said in (
        ("4XX", "The request must change, or (429) wait."),
        ("5XX", "The server failed, stops, or took too long."),
    )
}


def _add_routes(app: FastAPI, service: Service) -> None:
    post = functools.partial(app.post, responses=_RESPONSES, response_model=None)

    @post("/v1/chat/completions")
    async def chat(body: ChatRequest) -> Response:
        new = body.max_completion_tokens or body.max_tokens
        service.check(body, new)
        if body.top_logprobs is not None and not body.logprobs:
            raise Fault(400, "top_logprobs: only with logprobs", param="top_logprobs")
        with _admitted(service) as ticket:
            prompt = await service.inputs.chat(body.messages, new or 1)
            reply = Chat(service, ticket, body, prompt)
        return Answering(ticket, reply, bool(body.stream), service.meters)

    @post("/v1/completions")
    async def completions(body: CompletionRequest) -> Response:
        service.check(body, body.max_tokens)
        new = 16 if body.max_tokens is None else body.max_tokens
        with _admitted(service, len(body.prompts)) as ticket:
            prompts = [await service.inputs.text(text, new) for text in body.prompts]
            reply = Completions(service, ticket, body, prompts)
        return Answering(ticket, reply, bool(body.stream), service.meters)

    @app.get("/v1/models", responses=_RESPONSES)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}", responses=_RESPONSES)
    async def model(name: str) -> dict[str, Any]:
        if name != service.name:
            message = f"model: this server has {service.name!r}"
            raise Fault(404, message, param="model", code="model_not_found")
        return _model(service)

    @app.get("/health", responses=_RESPONSES)
    async def health() -> Response:
        is_alive = service.loop.is_alive
        said = {"status": "ok" if is_alive else "stopping", "model": service.name}
        return JSONResponse(said, 200 if is_alive else 503)

    @app.get("/metrics", responses=_RESPONSES, response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.meters.text(), media_type="text/plain; version=0.0.4")


@contextlib.contextmanager
def _admitted(service: Service, count: int = 1):
    """A ticket, which is given back here only if the request fails."""
    ticket = service.admit(count)
    try:
        yield ticket
    except BaseException:
        ticket.close()
        raise


def _model(service: Service) -> dict[str, Any]:
    """`max_model_len` is vLLM's field."""
    own = {"id": service.name, "object": "model", "created": service.created}
    return own | {"owned_by": "pangea_jax", "max_model_len": service.context}


async def _tell(_, fault: Fault) -> Response:
    return fault.response()


async def _tell_invalid(_, error: RequestValidationError) -> Response:
    return faults.from_validation(error.errors(), error.body).response()


async def _tell_http(_, error: HTTPException) -> Response:
    """Faults that the framework finds: unknown paths, methods, and bodies that are not UTF-8."""
    messages = {404: "there is no such path", 405: "the path has no such method"}
    said = messages.get(error.status_code, "the body is not JSON in UTF-8")
    headers = error.headers or {}
    return Fault(error.status_code, said, headers=headers).response()
