"""The requests, answers and errors of the service: those of OpenAI's embeddings, and of Cohere's and Jina's rerankers.

https://platform.openai.com/docs/api-reference/embeddings, https://docs.cohere.com/reference/rerank
"""

import asyncio
import base64
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

# Seconds in which a client must have sent its request, and after which a client that was refused may try again.
BODY_SECONDS, RETRY_SECONDS = 30, 1
KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


@dataclass(frozen=True)
class Limits:
    """What one request may hold, and how many may wait.

    body: bytes. inputs: texts, lists of token ids, or documents. tokens: of all inputs. queue: pieces of requests that
    wait for a replica, for each frontend.
    """

    body: int = 8 << 20
    inputs: int = 2048
    tokens: int = 131072
    queue: int = 1024


class RequestError(Exception):
    """An answer other than 200, in OpenAI's form. param: the field of the request that is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def response(self) -> Response:
        error = {"message": str(self), "type": KINDS.get(self.status, "invalid_request_error")}
        found = answer({"error": error | {"param": self.param, "code": self.code}}, self.status)
        if self.status in (429, 503):
            found.headers["Retry-After"] = str(RETRY_SECONDS)
        return found


class _Body(BaseModel):
    """Fields that are not listed are ignored: clients send others, such as `user`."""

    model_config = ConfigDict(strict=True)
    model: str


class EmbeddingsBody(_Body):
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)


class RerankBody(_Body):
    query: str
    documents: list[str]
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = False


B = TypeVar("B", bound=_Body)


def answer(content: Any, status: int = 200) -> Response:
    return Response(to_json(content), status, media_type="application/json")


async def read(request: Request, kind: type[B], limit: int) -> B:
    """Parse the body of a request. Raises RequestError: 400 for malformed JSON, 408 if it does not arrive in
    BODY_SECONDS, 413 if it is longer than `limit` bytes, 422 for wrong fields."""
    try:
        body = await asyncio.wait_for(_body(request, limit), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise RequestError(408, f"the body did not arrive in {BODY_SECONDS} s") from None
    except ClientDisconnect:
        raise RequestError(400, "the client went away") from None
    try:
        return kind.model_validate_json(bytes(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        raise RequestError(400, f"malformed JSON: {first['msg']}")
    field = str(first["loc"][0]) if first["loc"] else None
    message = first["msg"]
    if field == "input":
        message = "it must be a string, a list of strings, a list of token ids, or a list of lists of token ids"
    raise RequestError(422, f"{field or 'the body'}: {message}", field)


async def _body(request: Request, limit: int) -> bytearray:
    declared = request.headers.get("content-length", "")
    body = bytearray()
    if not declared.isdecimal() or int(declared) <= limit:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                break
        else:
            return body
    raise RequestError(413, f"the body is longer than {limit:,} bytes")


def embeddings(vectors: np.ndarray, body: EmbeddingsBody, num_tokens: int) -> Response:
    """The answer for vectors, float32 [N, dim]."""
    if body.encoding_format == "base64":
        shown: list = [base64.b64encode(row.tobytes()).decode() for row in vectors.astype("<f4")]
    else:
        shown = vectors.tolist()
    data = [{"object": "embedding", "index": index, "embedding": each} for index, each in enumerate(shown)]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return answer({"object": "list", "data": data, "model": body.model, "usage": usage})


def ranking(scores: np.ndarray, body: RerankBody, num_tokens: int) -> Response:
    """The answer for scores, float32 [N], of the documents: the best ones first."""
    results = []
    for index in np.argsort(-scores, kind="stable")[: body.top_n].tolist():
        result = {"index": index, "relevance_score": float(scores[index])}
        results.append(result | ({"document": {"text": body.documents[index]}} if body.return_documents else {}))
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return answer({"model": body.model, "results": results, "usage": usage})
