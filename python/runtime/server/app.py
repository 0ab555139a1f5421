"""The ASGI app: every route, and nothing of how tokens are made."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from runtime.front import Front, Generation
from runtime.request_builder import Prompt, RequestError
from runtime.server import protocol
from runtime.server.answers import ChatShape, CompletionShape, Shape
from runtime.server.chat_messages import chat_prompt
from runtime.server.errors import ApiError
from runtime.server.guard import Guard, GuardSettings
from runtime.server.metrics import CONTENT_TYPE, Metrics
from runtime.server.streaming import EventStream, EventWriter, finish
from runtime.server.web import page_response

UNHEALTHY_AFTER_S = 60.0  # without a step while requests run


@dataclass(frozen=True, slots=True)
class ServerSettings:
    model_names: tuple[str, ...]  # that the API answers to; the first one is shown
    version: str = "0"
    guard: GuardSettings = field(default_factory=GuardSettings)


def json_response(answer: Any, status: int = 200) -> Response:
    body = json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()
    return Response(body, status_code=status, media_type="application/json")


class Api:
    """The routes' shared state: the front, the settings and what both generating APIs do alike."""

    def __init__(self, front: Front, settings: ServerSettings, metrics: Metrics) -> None:
        self.front = front
        self.settings = settings
        self.metrics = metrics
        self.created = int(time.time())
        self.fingerprint = f"partita-{settings.version}"

    @property
    def model_name(self) -> str:
        return self.settings.model_names[0]

    def check_model(self, name: str | None) -> None:
        if name and name not in self.settings.model_names:
            known = ", ".join(self.settings.model_names)
            raise ApiError(
                404,
                f"The model {name[:200]!r} does not exist; served here: {known}.",
                code="model_not_found",
                param="model",
            )

    async def read(self, request: Request, kind: type) -> Any:
        """The checked body of a request; nothing is read while the model is still loading."""
        self.front.check_ready()
        fields = protocol.parse_json(await request.body())
        parsed = protocol.read_request(kind, fields)
        self.check_model(parsed.model)
        return parsed

    async def render(self, asked: Any) -> Prompt:
        """What the chat template makes of a request's messages; on a thread, for a template may take its time."""
        front = self.front
        return await front.loop.run_in_executor(None, chat_prompt, front.chat_template, front.builder, asked)

    async def answer(
        self, request: Request, asked: protocol.SamplingRequest, generation: Generation, shape: Shape
    ) -> Response:
        if asked.stream:
            options = asked.stream_options or protocol.StreamOptions()
            writer = EventWriter(
                shape, generation,
                include_usage=bool(options.include_usage), continuous_usage=bool(options.continuous_usage_stats),
            )  # fmt: skip
            return EventStream(generation, writer)
        with generation:
            await finish(generation, request.receive)
            return json_response(shape.whole())

    async def complete(self, request: Request) -> Response:
        arrival_s = time.monotonic()
        asked: protocol.CompletionRequest = await self.read(request, protocol.CompletionRequest)
        asked.check_stream_options()
        sampling = asked.sampling_params(self.front.default_sampling)
        if asked.echo and sampling.logprobs is not None:
            raise ApiError(
                400, "echo together with logprobs is not supported: the prompt's log probabilities are not computed.",
                code="unsupported_parameter", param="echo",
            )  # fmt: skip
        wanted = asked.prompts()
        self.front.check_queue(len(wanted) * sampling.n)
        prompts = []
        for one in wanted:
            if isinstance(one, str):
                add_special_tokens = asked.add_special_tokens is not False
                prompts.append(Prompt(await self.front.tokenize(one, add_special_tokens=add_special_tokens), one))
            else:
                prompts.append(Prompt(tuple(one)))
        generation = self.front.generate(
            f"cmpl-{request.state.request_id}", prompts, sampling, arrival_s=arrival_s,
            service=asked.service_level(request.headers), cache_salt=asked.cache_salt or "",
        )  # fmt: skip
        shape = CompletionShape(
            generation,
            self.model_name,
            self.fingerprint,
            with_token_ids=bool(asked.return_token_ids),
            echo=bool(asked.echo),
        )
        return await self.answer(request, asked, generation, shape)

    async def chat(self, request: Request) -> Response:
        arrival_s = time.monotonic()
        asked: protocol.ChatCompletionRequest = await self.read(request, protocol.ChatCompletionRequest)
        asked.check_stream_options()
        sampling = asked.sampling_params(self.front.default_sampling)
        self.front.check_queue(sampling.n)
        prompt = await self.render(asked)
        generation = self.front.generate(
            f"chatcmpl-{request.state.request_id}", [prompt], sampling, arrival_s=arrival_s,
            service=asked.service_level(request.headers), cache_salt=asked.cache_salt or "", param="messages",
        )  # fmt: skip
        shape = ChatShape(generation, self.model_name, self.fingerprint, with_token_ids=bool(asked.return_token_ids))
        return await self.answer(request, asked, generation, shape)

    async def tokenize(self, request: Request) -> Response:
        asked: protocol.TokenizeRequest = await self.read(request, protocol.TokenizeRequest)
        if (asked.prompt is None) == (asked.messages is None):
            raise ApiError(400, "Give either prompt or messages.", code="missing_parameter", param="prompt")
        if asked.prompt is not None:
            add_special_tokens = asked.add_special_tokens is not False
            tokens = list(await self.front.tokenize(asked.prompt, add_special_tokens=add_special_tokens))
        else:
            tokens = list((await self.render(asked)).token_ids)
        answer = {"count": len(tokens), "max_model_len": self.front.max_model_len, "tokens": tokens}
        if asked.return_token_strs:
            strings = [self.front.tokenizer.token_bytes(token_id).decode("utf-8", "replace") for token_id in tokens]
            answer["token_strs"] = strings
        return json_response(answer)

    async def detokenize(self, request: Request) -> Response:
        asked: protocol.DetokenizeRequest = await self.read(request, protocol.DetokenizeRequest)
        vocab_size = self.front.tokenizer.vocab_size
        for token_id in asked.tokens:
            if not 0 <= token_id < vocab_size:
                raise ApiError(
                    400, f"tokens holds {token_id}; ids of this model are 0 to {vocab_size - 1}.", code="invalid_value",
                    param="tokens",
                )  # fmt: skip
        return json_response({"prompt": self.front.tokenizer.decode(asked.tokens, skip_special_tokens=False)})

    def model_card(self, name: str) -> dict[str, Any]:
        return {
            "id": name, "object": "model", "created": self.created, "owned_by": "partita", "root": self.model_name,
            "parent": None, "max_model_len": self.front.max_model_len or None,
        }  # fmt: skip

    def health(self, *, ready: bool) -> Response:
        """``ready`` also refuses while the queue is full or the server drains; neither ever generates."""
        if self.front.engine is not None:
            self.front.look_at_engine()
        reason = self.front.unready_reason()
        stuck_s = self.front.stuck_s()
        if reason is None and stuck_s > UNHEALTHY_AFTER_S:
            reason = "stuck", f"no step for {stuck_s:.0f} s while requests run"
        if reason is not None and not ready and reason[0] == "shutting_down":
            reason = None
        if reason is None and ready:
            try:
                self.front.check_queue(1)
            except RequestError as refusal:
                reason = refusal.code, refusal.message
        if reason is not None:
            raise ApiError(503, f"Not ready: {reason[1]}.", code=reason[0], headers={"retry-after": "1"})
        return json_response({"status": "ok"})


def create_app(
    front: Front, settings: ServerSettings, metrics: Metrics, on_start: Callable[[], None] | None = None
) -> Guard:
    """The whole server as one ASGI app. Its lifespan starts the front, calls ``on_start``, stops the front."""

    @contextlib.asynccontextmanager
    async def lifespan(_app):
        front.start()
        if on_start is not None:
            on_start()
        yield
        await front.stop()

    app = FastAPI(
        title="Partita",
        version=settings.version,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    api = Api(front, settings, metrics)
    _add_error_answers(app)
    _add_generating_routes(app, api)
    _add_status_routes(app, api)
    return Guard(app, settings.guard, metrics)


def _add_generating_routes(app: FastAPI, api: Api) -> None:
    def described(kind: type) -> dict:
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        definitions = schema.pop("$defs", {})
        if definitions:
            schema = json.loads(json.dumps(schema))
            for option in schema["properties"].get("stream_options", {}).get("anyOf", []):
                if option.pop("$ref", None):
                    option.update(definitions["StreamOptions"])
        return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

    def post(path: str, kind: type, handler) -> None:
        app.add_api_route(path, handler, methods=["POST"], openapi_extra=described(kind), response_class=Response)

    post("/v1/chat/completions", protocol.ChatCompletionRequest, api.chat)
    post("/v1/completions", protocol.CompletionRequest, api.complete)
    post("/tokenize", protocol.TokenizeRequest, api.tokenize)
    post("/detokenize", protocol.DetokenizeRequest, api.detokenize)


def _add_status_routes(app: FastAPI, api: Api) -> None:
    def get(path: str):
        """GET, and HEAD for those who probe with it."""

        def register(handler):
            app.add_api_route(path, handler, methods=["GET"], response_class=Response)
            app.add_api_route(path, handler, methods=["HEAD"], response_class=Response, include_in_schema=False)
            return handler

        return register

    @app.get("/v1/models", response_class=Response)
    async def models():
        return json_response({"object": "list", "data": [api.model_card(name) for name in api.settings.model_names]})

    @app.get("/v1/models/{name:path}", response_class=Response)
    async def model(name: str):
        api.check_model(name)
        return json_response(api.model_card(name))

    @app.get("/metrics", response_class=Response)
    async def metrics():
        return Response(api.metrics.exposition(), headers={"content-type": CONTENT_TYPE})

    @app.get("/version", response_class=Response)
    async def version():
        return json_response({"version": api.settings.version})

    @get("/live")
    async def live():
        return json_response({"status": "ok"})

    @get("/ready")
    async def ready():
        return api.health(ready=True)

    @get("/health")
    async def health():
        return api.health(ready=False)

    @get("/")
    async def page():
        return page_response()

    @get("/favicon.ico")
    async def favicon():
        return Response(status_code=204)


def _add_error_answers(app: FastAPI) -> None:
    def respond(error: ApiError) -> Response:
        return Response(error.body(), status_code=error.status, media_type="application/json", headers=error.headers)

    @app.exception_handler(ApiError)
    async def api_error(_request, error: ApiError):
        return respond(error)

    @app.exception_handler(RequestError)
    async def refused(_request, refusal: RequestError):
        return respond(ApiError.from_refusal(refusal))

    @app.exception_handler(Exception)
    async def failed(_request, _error):  # the guard, to which it goes on from here, writes it to the log
        return respond(ApiError(500, "The server failed to answer this request; its log says more."))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException):
        if error.status_code == 404:
            return respond(ApiError(404, f"There is no route {request.url.path[:200]!r}.", code="route_not_found"))
        if error.status_code == 405:
            allowed = (error.headers or {}).get("allow") or (error.headers or {}).get("Allow", "")
            message = f"{request.method[:20]} is not allowed for {request.url.path[:200]!r}."
            return respond(ApiError(405, message, headers={"allow": allowed} if allowed else None))
        return respond(ApiError(error.status_code, str(error.detail)))
