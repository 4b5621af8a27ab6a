"""The frontend of a service: it speaks HTTP, checks requests, tokenizes, and holds no model."""

import asyncio
import logging
import secrets
import urllib.request
from itertools import chain
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.util.metrics import Counter, Histogram
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fastbert.ray.protocol import EmbeddingsBody, RequestError, RerankBody, answer, embeddings, ranking, read
from fastbert.ray.replica import Description, Settings
from fastbert.tokenization import PackedTokens

# Seconds that a piece of a request waits for a replica, and how often it is tried on replicas that die.
REPLICA_SECONDS, ATTEMPTS = 60, 3
# The metrics that are shown: Ray Serve's, and ours, as Ray names them.
METRICS = ("ray_serve_", "ray_fastbert_")

logger = logging.getLogger("fastbert")


class Frontend:
    """The deployment that speaks HTTP. model: a handle of `Model`."""

    def __init__(self, settings: Settings, model: Any):
        self._settings, self._model = settings, model
        self._description: Description | None = None
        self._starting: asyncio.Task | None = None
        self._active, self._stopping = 0, False
        self._requests = Counter("fastbert_requests", "Requests.", ("path", "status"))
        self._inputs = Counter("fastbert_inputs", "Texts, lists of token ids, and pairs that were answered.")
        self._tokens = Counter("fastbert_tokens", "Tokens that were answered.")
        self._seconds = Histogram(
            "fastbert_request_seconds", "Duration of a request.", [0.005 * 2**power for power in range(14)], ("path",)
        )

    def __serve_build_asgi_app__(self) -> Starlette:
        self._starting = asyncio.get_running_loop().create_task(self._learn())
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/embeddings", self._guarded(self._embeddings), methods=["POST"]),
            Route("/v1/rerank", self._guarded(self._rerank), methods=["POST"]),
        ]
        handlers: Any = {HTTPException: _http_error, RequestError: _request_error}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def _learn(self) -> None:
        """Wait until a replica of the model is ready."""
        while self._description is None:
            try:
                self._description = await self._model.describe.remote()
            except Exception as error:
                logger.warning("the model is not ready: %s", error)
                await asyncio.sleep(1)

    async def drain(self, seconds: float) -> None:
        """Refuse new requests, and wait until those in flight are answered, at most so long."""
        self._stopping = True
        until = asyncio.get_running_loop().time() + seconds
        while self._active and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.05)

    def _guarded(self, handler):
        async def guarded(request: Request) -> Response:
            begun, path = asyncio.get_running_loop().time(), request.url.path
            self._active += 1
            try:
                self._check_key(request)
                found = await handler(request)
            except RequestError as error:
                found = error.response()
            except Exception as error:
                logger.exception("a request failed")
                found = RequestError(500, f"an error of the service: {type(error).__name__}").response()
            finally:
                self._active -= 1
            self._requests.inc(tags={"path": path, "status": str(found.status_code)})
            self._seconds.observe(asyncio.get_running_loop().time() - begun, tags={"path": path})
            return found

        return guarded

    def _check_key(self, request: Request) -> None:
        key = self._settings.api_key
        given = request.headers.get("authorization", "").encode("latin-1")
        if key is not None and not secrets.compare_digest(given, f"Bearer {key}".encode()):
            message = "the API key is missing or wrong: send Authorization: Bearer KEY"
            raise RequestError(401, message, None, "invalid_api_key")

    async def _health(self, request: Request) -> Response:
        self._ready()
        return answer({"status": "ready"})

    async def _metrics(self, request: Request) -> Response:
        """The metrics of Ray Serve and of all frontends, from the exporter of each machine of the cluster."""
        try:
            pages = await asyncio.to_thread(_exported)
        except OSError as error:
            raise RequestError(503, f"an exporter of Ray does not answer: {error}") from None
        lines = (line for page in pages for line in page.splitlines())
        kept = [line for line in lines if line.removeprefix("# HELP ").removeprefix("# TYPE ").startswith(METRICS)]
        return Response("\n".join(kept) + "\n", media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        model = {"id": self._settings.name, "object": "model", "created": 0, "owned_by": "fastbert"}
        return answer({"object": "list", "data": [model]})

    async def _embeddings(self, request: Request) -> Response:
        description = self._ready()
        body = await read(request, EmbeddingsBody, self._settings.limits.body)
        self._check_model(body.model, ranks=False)
        inputs: list = [body.input] if isinstance(body.input, str) else body.input
        if inputs and isinstance(inputs[0], int):
            inputs = [inputs]
        self._check_inputs(inputs, "input")
        if body.dimensions is not None and body.dimensions > description.dim:
            message = f"dimensions={body.dimensions}: the model's vectors have {description.dim}"
            raise RequestError(422, message, "dimensions")
        if isinstance(inputs[0], str):
            tokens = await asyncio.to_thread(description.tokenizer, [description.prompt + text for text in inputs])
        else:
            tokens = _given(inputs, description)
        vectors = await self._outputs(tokens, description, "input")
        if body.dimensions is not None:
            vectors = vectors[:, : body.dimensions]
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return embeddings(vectors, body, len(tokens.input_ids))

    async def _rerank(self, request: Request) -> Response:
        description = self._ready()
        body = await read(request, RerankBody, self._settings.limits.body)
        self._check_model(body.model, ranks=True)
        self._check_inputs(body.documents, "documents")
        if not body.query:
            raise RequestError(400, "query is empty", "query")
        pairs = [(description.prompt + body.query, document) for document in body.documents]
        tokens = await asyncio.to_thread(description.tokenizer, pairs)
        scores = await self._outputs(tokens, description, "documents")
        return ranking(scores, body, len(tokens.input_ids))

    def _ready(self) -> Description:
        if self._stopping:
            raise RequestError(503, "the service is stopping")
        if self._description is None:
            raise RequestError(503, "the model is starting")
        return self._description

    def _check_model(self, name: str, ranks: bool) -> None:
        settings = self._settings
        if name != settings.name:
            raise RequestError(404, f"there is no model {name!r}, only {settings.name!r}", "model", "model_not_found")
        if ranks != settings.ranks:
            kind, path = ("cross-encoder", "rerank") if settings.ranks else ("model of embeddings", "embeddings")
            raise RequestError(400, f"{name} is a {kind}: send requests to /v1/{path}", "model")

    def _check_inputs(self, inputs: list, field: str) -> None:
        limit = self._settings.limits.inputs
        if not inputs:
            raise RequestError(400, f"{field} is empty", field)
        if len(inputs) > limit:
            raise RequestError(413, f"{field} has {len(inputs):,} entries, and at most {limit:,} are allowed", field)
        for index, each in enumerate(inputs):
            if not each:
                raise RequestError(400, f"{field} {index} is empty", field)

    async def _outputs(self, tokens: PackedTokens, description: Description, field: str) -> np.ndarray:
        """The vectors [N, dim] or scores [N] of N inputs. Raises RequestError."""
        limit = self._settings.limits.tokens
        longest = int(tokens.lengths.argmax())
        if tokens.lengths[longest] > description.longest:
            message = (
                f"{field} {longest} has {tokens.lengths[longest]:,} tokens, and the model takes {description.longest:,}"
            )
            raise RequestError(413, message, field)
        if len(tokens.input_ids) > limit:
            message = f"{field} has {len(tokens.input_ids):,} tokens in all, and at most {limit:,} are allowed"
            raise RequestError(413, message, field)
        found = await asyncio.gather(*(self._piece(piece) for piece in _pieces(tokens, description.piece)))
        outputs = np.concatenate(found)
        if not np.isfinite(outputs).all():
            raise RequestError(500, "the model gives NaN or infinity: another dtype may help")
        self._inputs.inc(len(outputs))
        self._tokens.inc(len(tokens.input_ids))
        return outputs

    async def _piece(self, piece: PackedTokens) -> np.ndarray:
        """The outputs of a piece, from another replica if one dies."""
        for _ in range(ATTEMPTS):
            try:
                return await asyncio.wait_for(self._model.outputs.remote(piece), REPLICA_SECONDS)
            except BackPressureError:
                raise RequestError(429, "the queue is full: try again later") from None
            except asyncio.TimeoutError:
                raise RequestError(503, f"no replica has answered in {REPLICA_SECONDS} s") from None
            except (RayActorError, DeploymentUnavailableError) as error:
                logger.warning("a replica of the model has died: %s", error)
        raise RequestError(503, f"{ATTEMPTS} replicas have died with this request")


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return RequestError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()


def _exported() -> list[str]:
    """What the exporters of the cluster's machines say."""
    pages = []
    for node in ray.nodes():
        if node["Alive"]:
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with urllib.request.urlopen(url, timeout=5) as page:
                pages.append(page.read().decode())
    return pages


def _given(inputs: list, description: Description) -> PackedTokens:
    """The tokens of lists of ids. Raises RequestError for an id that is not in the vocabulary."""
    lengths = np.array([len(each) for each in inputs], np.int64)
    for index, each in enumerate(inputs):
        for token in each:
            if not 0 <= token < description.vocab_size:
                message = (
                    f"input {index} has the token id {token}, and the model's are 0 to {description.vocab_size - 1:,}"
                )
                raise RequestError(422, message, "input")
    ids = np.fromiter(chain.from_iterable(inputs), np.int32, int(lengths.sum()))
    return PackedTokens(ids, np.zeros_like(ids) if description.tokenizer.gives_types else None, lengths)


def _pieces(tokens: PackedTokens, limit: int) -> list[PackedTokens]:
    """Cut the tokens of inputs into pieces of at most `limit` tokens, and whole inputs."""
    ends, pieces, start = tokens.lengths.cumsum(), [], 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, before + limit, side="right"))
        part = slice(before, int(ends[stop - 1]))
        types = None if tokens.token_type_ids is None else tokens.token_type_ids[part]
        pieces.append(PackedTokens(tokens.input_ids[part], types, tokens.lengths[start:stop]))
        start = stop
    return pieces
