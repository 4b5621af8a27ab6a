"""The service: right answers to OpenAI's client, one clear error for every bad request, and no answer lost."""

import asyncio
import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import transformers

from fastbert.commands.texts import docstrings

ray = pytest.importorskip("ray", reason="fastbert.ray needs Ray")
import httpx2  # noqa: E402
import openai  # noqa: E402
from ray.exceptions import ActorDiedError  # noqa: E402
from ray.serve.exceptions import BackPressureError  # noqa: E402
from sentence_transformers import CrossEncoder, SentenceTransformer  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from fastbert.ray import app, protocol  # noqa: E402
from fastbert.ray.frontend import Frontend  # noqa: E402
from fastbert.ray.protocol import Limits  # noqa: E402
from fastbert.ray.replica import Description, Settings  # noqa: E402
from fastbert.tokenization import PackingTokenizer  # noqa: E402

pytestmark = pytest.mark.xdist_group("ray")
TEXTS = [" ".join(text.split())[:200] for text in docstrings(256) if text.strip()]
LIMITS = Limits(body=2000, inputs=5, tokens=100)


# The frontend without Ray: its model gives the sum and the number of a sequence's ids as a vector.


class FakeModel:
    """Stands for a deployment's handle. errors: what the next calls raise."""

    def __init__(self, description: Description):
        self.description, self.errors, self.sizes = description, [], []
        self.describe = self.outputs = self

    async def remote(self, piece=None):
        if piece is None:
            return self.description
        self.sizes.append(len(piece.input_ids))
        if self.errors:
            raise self.errors.pop()
        parts = np.split(piece.input_ids, np.cumsum(piece.lengths)[:-1])
        vectors = [[part.sum(), len(part), 1, 0] for part in parts]
        return np.array(vectors, np.float32) if self.description.dim > 1 else np.array(vectors, np.float32)[:, 0]


@pytest.fixture
def fake(tokenizer) -> FakeModel:
    packing = PackingTokenizer(tokenizer, padding=True)
    return FakeModel(Description(packing, "", longest=30, piece=40, vocab_size=30522, dim=4))


def client_of(fake: FakeModel, ranks: bool = False, api_key: str | None = None) -> TestClient:
    settings = Settings("folder/m", "m", ranks, None, False, api_key, LIMITS)

    async def asgi(scope, receive, send):
        # The event loop of the frontend is that of the client.
        if not hasattr(asgi, "app"):
            asgi.app = Frontend(settings, fake).__serve_build_asgi_app__()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await asgi.app(scope, receive, send)

    return TestClient(asgi)


@pytest.fixture
def client(fake):
    with client_of(fake) as found:
        yield found


def error_of(response) -> dict:
    """The error of an answer in OpenAI's form."""
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


def test_every_kind_of_input(client, tokenizer):
    ids = [ids_of(tokenizer, text) for text in ("a cat", "NUL \0 and \N{SNOWMAN}")]
    vectors = [[float(sum(each)), len(each), 1, 0] for each in ids]
    for given, wanted in (
        ("a cat", vectors[:1]),
        (["a cat", "NUL \0 and \N{SNOWMAN}"], vectors),
        (ids[0], vectors[:1]),
        (ids, vectors),
    ):
        found = client.post("/v1/embeddings", json={"model": "m", "input": given, "user": "someone"})
        assert found.status_code == 200, found.text
        body = found.json()
        assert body["object"] == "list"
        assert body["model"] == "m"
        assert [each["index"] for each in body["data"]] == list(range(len(wanted)))
        assert [each["embedding"] for each in body["data"]] == wanted
        count = sum(int(each[1]) for each in wanted)
        assert body["usage"] == {"prompt_tokens": count, "total_tokens": count}


def test_formats_and_dimensions(client, tokenizer):
    request = {"model": "m", "input": "a cat", "encoding_format": "base64", "dimensions": 2}
    (found,) = client.post("/v1/embeddings", json=request).json()["data"]
    ids = ids_of(tokenizer, "a cat")
    wanted = np.array([sum(ids), len(ids)], np.float32)
    np.testing.assert_allclose(
        np.frombuffer(base64.b64decode(found["embedding"]), "<f4"), wanted / np.linalg.norm(wanted), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        (b"{", 400, None, "malformed JSON"),
        (b"", 400, None, "malformed JSON"),
        (b'{"model": "m", "input": "\xff"}', 400, None, "malformed JSON"),
        (rb'{"model": "m", "input": "\ud800"}', 400, None, "malformed JSON"),
        (b"[]", 422, None, "the body: "),
        ({"model": "m"}, 422, "input", "input: "),
        ({"input": "a"}, 422, "model", "model: Field required"),
        ({"model": 1, "input": "a"}, 422, "model", "model: Input should be a valid string"),
        ({"model": "m", "input": 1}, 422, "input", "input: it must be a string, a list of strings, a list of token"),
        ({"model": "m", "input": [1, "a"]}, 422, "input", "input: it must be"),
        ({"model": "m", "input": [True]}, 422, "input", "input: it must be"),
        ({"model": "m", "input": [1.5]}, 422, "input", "input: it must be"),
        ({"model": "m", "input": [[1], None]}, 422, "input", "input: it must be"),
        ({"model": "m", "input": "a", "encoding_format": "int8"}, 422, "encoding_format", "encoding_format: "),
        ({"model": "m", "input": "a", "dimensions": 0}, 422, "dimensions", "dimensions: "),
        ({"model": "m", "input": "a", "dimensions": 5}, 422, "dimensions", "dimensions=5: the model's vectors have 4"),
        ({"model": "m", "input": [30522]}, 422, "input", "token id 30522, and the model's are 0 to 30,521"),
        ({"model": "m", "input": [-1]}, 422, "input", "token id -1"),
        ({"model": "m", "input": ""}, 400, "input", "input 0 is empty"),
        ({"model": "m", "input": []}, 400, "input", "input is empty"),
        ({"model": "m", "input": ["a", ""]}, 400, "input", "input 1 is empty"),
        ({"model": "m", "input": [[]]}, 400, "input", "input 0 is empty"),
        ({"model": "other", "input": "a"}, 404, "model", "there is no model 'other', only 'm'"),
        ({"model": "m", "input": ["a"] * 6}, 413, "input", "input has 6 entries, and at most 5 are allowed"),
        ({"model": "m", "input": ["a", "b " * 40]}, 413, "input", "input 1 has 42 tokens, and the model takes 30"),
        ({"model": "m", "input": ["b " * 20] * 5}, 413, "input", "input has 110 tokens in all, and at most 100"),
        ({"model": "m", "input": "a" * 2000}, 413, None, "the body is longer than 2,000 bytes"),
    ],
)
def test_a_bad_request_gets_one_clear_error(client, body, status, param, message):
    content = body if isinstance(body, bytes) else json.dumps(body)
    found = client.post("/v1/embeddings", content=content)
    error = error_of(found)
    assert found.status_code == status, error
    assert message in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_a_huge_body_without_a_length_is_cut_off(client):
    sent = []

    def chunks():
        for _ in range(1000):
            sent.append(1)
            yield b"a" * 100

    assert client.post("/v1/embeddings", content=chunks()).status_code == 413


def test_a_body_that_does_not_arrive_is_given_up(client, monkeypatch):
    monkeypatch.setattr(protocol, "BODY_SECONDS", 0.1)

    async def never(request, limit):
        await asyncio.sleep(60)

    monkeypatch.setattr(protocol, "_body", never)
    found = client.post("/v1/embeddings", json={"model": "m", "input": "a"})
    assert found.status_code == 408
    assert error_of(found)["message"] == "the body did not arrive in 0.1 s"


def test_paths_and_methods(client):
    assert client.get("/health").json() == {"status": "ready"}
    assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["m"]
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/v1/embeddings", 405), ("POST", "/health", 405)):
        found = client.request(method, path)
        assert found.status_code == status
        assert path in error_of(found)["message"]
    found = client.post("/v1/rerank", json={"model": "m", "query": "a", "documents": ["b"]})
    assert found.status_code == 400
    assert error_of(found)["message"] == "m is a model of embeddings: send requests to /v1/embeddings"


def test_the_key(fake):
    body = {"model": "m", "input": "a"}
    with client_of(fake, api_key="sécret") as client:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Bearer "}):
            found = client.post("/v1/embeddings", json=body, headers=headers)
            assert found.status_code == 401
            assert error_of(found)["code"] == "invalid_api_key"
        assert client.get("/v1/models").status_code == 401
        assert client.get("/health").status_code == 200
    with client_of(fake, api_key="secret") as client:
        assert client.post("/v1/embeddings", json=body, headers={"Authorization": "Bearer secret"}).status_code == 200


def test_long_requests_are_cut_into_pieces_in_order(client, fake, tokenizer):
    texts = ["a " * count for count in (20, 1, 17, 9, 22)]
    found = client.post("/v1/embeddings", json={"model": "m", "input": texts}).json()["data"]
    ids = [ids_of(tokenizer, text) for text in texts]
    assert [each["embedding"][:2] for each in found] == [[sum(each), len(each)] for each in ids]
    assert fake.sizes == [25, 30, 24]


def test_failures_of_the_model(client, fake):
    def post():
        return client.post("/v1/embeddings", json={"model": "m", "input": "a"})

    died = ActorDiedError()
    fake.errors = [died, died]
    assert post().status_code == 200
    for error, count, status, message in (
        (died, 3, 503, "3 replicas have died with this request"),
        (BackPressureError(num_queued_requests=9, max_queued_requests=9), 1, 429, "the queue is full: try again later"),
        (asyncio.TimeoutError(), 1, 503, "no replica has answered in 60 s"),
        (ZeroDivisionError("secret"), 1, 500, "an error of the service: ZeroDivisionError"),
    ):
        fake.errors = [error] * count
        found = post()
        assert found.status_code == status
        assert error_of(found)["message"] == message
        assert ("retry-after" in found.headers) == (status in (429, 503))
    assert post().status_code == 200


def test_a_vector_that_is_not_finite_is_never_sent(client, fake, monkeypatch):
    async def remote(piece):
        return np.full((1, 4), np.nan, np.float32)

    monkeypatch.setattr(fake, "remote", remote)
    found = client.post("/v1/embeddings", json={"model": "m", "input": "a"})
    assert found.status_code == 500
    assert error_of(found)["message"] == "the model gives NaN or infinity: another dtype may help"


def test_requests_before_the_model_is_ready(fake, monkeypatch):
    async def remote(piece=None):
        raise ConnectionError

    monkeypatch.setattr(fake, "remote", remote)
    with client_of(fake) as client:
        for found in (client.get("/health"), client.post("/v1/embeddings", json={"model": "m", "input": "a"})):
            assert found.status_code == 503
            assert error_of(found)["message"] == "the model is starting"
            assert "retry-after" in found.headers


def test_draining_answers_what_is_in_flight_and_refuses_the_rest(fake):
    async def run() -> None:
        service = Frontend(Settings("folder/m", "m", False, None, False, None, LIMITS), fake)
        asgi, release = service.__serve_build_asgi_app__(), asyncio.Event()
        await asyncio.sleep(0.01)
        real = fake.remote

        async def remote(piece):
            await release.wait()
            return await real(piece)

        fake.remote = remote
        transport = httpx2.ASGITransport(app=asgi)
        async with httpx2.AsyncClient(transport=transport, base_url="http://service") as client:

            def post():
                return asyncio.create_task(client.post("/v1/embeddings", json={"model": "m", "input": "a"}))

            waiting = post()
            await asyncio.sleep(0.1)
            draining = asyncio.create_task(service.drain(60))
            await asyncio.sleep(0.1)
            refused = await post()
            assert refused.status_code == 503
            assert error_of(refused)["message"] == "the service is stopping"
            assert not draining.done()
            release.set()
            assert (await waiting).status_code == 200
            await draining

    asyncio.run(run())


def test_ranking(fake, tokenizer):
    fake.description = Description(fake.description.tokenizer, "", longest=30, piece=40, vocab_size=30522, dim=1)
    request = {"model": "m", "query": "a", "documents": ["b", "a much longer one", "c d"], "top_n": 2}
    with client_of(fake, ranks=True) as client:
        found = client.post("/v1/rerank", json=request | {"return_documents": True}).json()
        scores = [sum(tokenizer("a", text)["input_ids"]) for text in request["documents"]]
        best = sorted(range(3), key=lambda index: -scores[index])[:2]
        assert [each["index"] for each in found["results"]] == best
        assert [each["relevance_score"] for each in found["results"]] == [scores[index] for index in best]
        assert [each["document"]["text"] for each in found["results"]] == [request["documents"][i] for i in best]
        assert "document" not in client.post("/v1/rerank", json=request).json()["results"][0]
        for change, status, param in (
            ({"documents": []}, 400, "documents"),
            ({"query": ""}, 400, "query"),
            ({"documents": "b"}, 422, "documents"),
            ({"top_n": 0}, 422, "top_n"),
            ({"model": "x"}, 404, "model"),
        ):
            found = client.post("/v1/rerank", json=request | change)
            assert (found.status_code, error_of(found)["param"]) == (status, param)
        found = client.post("/v1/embeddings", json={"model": "m", "input": "a"})
        assert error_of(found)["message"] == "m is a cross-encoder: send requests to /v1/rerank"


def test_models_that_cannot_be_served(cross_paths, tmp_path):
    with pytest.raises(ValueError, match="has 3 labels: only a cross-encoder with one can rank documents"):
        app(cross_paths[3])
    with pytest.raises(OSError, match="there is no folder /none"):
        app("/none")
    with pytest.raises(ValueError, match="queue=9: a request of 131,072 tokens may be 65 pieces itself"):
        app(cross_paths[1], limits=Limits(queue=9))
    transformers.DistilBertConfig(n_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a model of type 'distilbert'"):
        app(str(tmp_path))


# The command


class Service:
    """`fastbert serve` in a process of its own. lines: what it has said."""

    def __init__(self, model: str, *options: str, **variables: str):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [str(Path(sys.executable).with_name("fastbert")), "serve", model, "--port", str(self.port), *options]
        self.process = subprocess.Popen(
            command, env=inherited | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self._reading = threading.Thread(target=lambda: self.lines.extend(self.process.stdout))
        self._reading.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self, **options) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="key", timeout=90, **options)

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=90)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()

    def status(self) -> int | None:
        """Of /health; None if nothing listens."""
        try:
            return self.request("GET", "/health")[0]
        except OSError:
            return None

    def wait(self) -> set[int | None]:
        """Wait until it is ready. Returns the statuses of /health before."""
        until, seen = time.monotonic() + 120, set()
        while (status := self.status()) != 200:
            assert self.process.poll() is None, "".join(self.lines)
            assert time.monotonic() < until, "".join(self.lines)
            seen.add(status)
            time.sleep(0.02)
        return seen

    def replica(self, deployment: str) -> int:
        found = subprocess.run(
            ["pgrep", "-f", f"^ray::ServeReplica:fastbert:{deployment}"], check=True, capture_output=True, text=True
        )
        return int(found.stdout.split()[0])

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(120)
        self._reading.join()
        return status


@pytest.fixture(scope="module")
def service(minilm_path):
    found = Service(minilm_path, "--name", "minilm")
    try:
        found.before = found.wait()
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="module")
def expected(minilm_path) -> np.ndarray:
    return SentenceTransformer(minilm_path, device="cpu").encode(TEXTS)


def load(service: Service, clients: int, per_request: int, seconds: float, wanted: np.ndarray) -> tuple[int, list]:
    """Send requests from several clients at once and check every answer. Returns how many, and the errors."""
    until, errors = time.monotonic() + seconds, []

    def one(number: int) -> int:
        client, start, count = service.client(max_retries=0), number * per_request, 0
        while time.monotonic() < until:
            rows = [(start + row) % len(TEXTS) for row in range(per_request)]
            start += per_request * clients
            try:
                found = client.embeddings.create(model="minilm", input=[TEXTS[row] for row in rows])
            except openai.OpenAIError as error:
                errors.append(error)
                continue
            np.testing.assert_allclose([each.embedding for each in found.data], wanted[rows], rtol=0, atol=2e-6)
            count += 1
        return count

    with ThreadPoolExecutor(clients) as pool:
        return sum(pool.map(one, range(clients))), errors


def wait_for(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.001)


def test_the_openai_client_gets_the_vectors_of_encode(service, expected, tokenizer):
    # While it was starting: Ray's own answers come before those of the frontend.
    assert service.before <= {None, 404, 503}
    client = service.client()
    assert [model.id for model in client.models.list()] == ["minilm"]
    found = client.embeddings.create(model="minilm", input=TEXTS)  # more than one piece
    np.testing.assert_allclose([each.embedding for each in found.data], expected, rtol=0, atol=2e-6)
    found = client.embeddings.create(model="minilm", input=tokenizer(TEXTS[:3])["input_ids"], encoding_format="float")
    np.testing.assert_allclose([each.embedding for each in found.data], expected[:3], rtol=0, atol=2e-6)
    assert found.usage.prompt_tokens == sum(map(len, tokenizer(TEXTS[:3])["input_ids"]))
    for change, error in (
        ({"model": "other"}, openai.NotFoundError),
        ({"input": []}, openai.BadRequestError),
        ({"dimensions": 999}, openai.UnprocessableEntityError),
    ):
        with pytest.raises(error) as raised:
            client.embeddings.create(**{"model": "minilm", "input": "a", **change})
        assert raised.value.body["message"]


def test_many_clients_at_once(service, expected):
    answers, errors = load(service, clients=64, per_request=1, seconds=10, wanted=expected)
    assert not errors
    assert answers > 64


def test_a_killed_replica_loses_no_answer(service, expected):
    def kill() -> None:
        time.sleep(2)
        os.kill(service.replica("Model"), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    before = service.replica("Model")
    answers, errors = load(service, clients=8, per_request=4, seconds=20, wanted=expected)
    killer.join()
    assert not errors
    assert answers > 8
    assert service.replica("Model") != before


def test_slow_and_vanishing_clients_harm_nobody(service, expected):
    slow = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(20)]
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    for each in slow:
        each.sendall(head + b'{"model"')
    body = json.dumps({"model": "minilm", "input": TEXTS[:50]}).encode()
    vanishing = [http.client.HTTPConnection("127.0.0.1", service.port) for _ in range(5)]
    for each in vanishing:
        each.request("POST", "/v1/embeddings", body)
        each.close()
    answers, errors = load(service, clients=4, per_request=4, seconds=3, wanted=expected)
    assert answers
    assert not errors
    slow[0].sendall(b': "minilm", "input": "a"}'.ljust(92))
    assert slow[0].recv(15) == b"HTTP/1.1 200 OK"
    for each in slow:
        each.close()


def test_raw_requests(service):
    for body, status in ((b"\0", 400), (b'{"model": "minilm", "input": "\xc3"}', 400), (b"x" * (9 << 20), 413)):
        found, answer = service.request("POST", "/v1/embeddings", body)
        assert found == status
        assert json.loads(answer)["error"]["message"]


def test_metrics_count_requests(service):
    """Ray exports them every few seconds."""
    service.client().embeddings.create(model="minilm", input="a")
    until = time.monotonic() + 40
    while True:
        status, page = service.request("GET", "/metrics")
        assert status == 200
        if b'path="/v1/embeddings",status="200"' in page and b"ray_serve_num_http_requests_total" in page:
            break
        assert time.monotonic() < until
        time.sleep(1)


def test_a_cross_encoder_with_a_key_and_a_short_queue_that_is_drained(cross_paths, tmp_path):
    limits = ("--max-tokens", "8192", "--max-queue", "5")
    service = Service(cross_paths[1], "--name", "cross", *limits, FASTBERT_API_KEY="key")
    try:
        service.wait()
        documents = [text[:40] for text in TEXTS[1:9]]
        body = json.dumps({"model": "cross", "query": "a query", "documents": documents}).encode()
        assert service.request("POST", "/v1/rerank", body)[0] == 401
        status, answer = service.request("POST", "/v1/rerank", body, Authorization="Bearer key")
        assert status == 200
        scores = CrossEncoder(cross_paths[1], device="cpu").predict([("a query", text) for text in documents])
        found = {each["index"]: each["relevance_score"] for each in json.loads(answer)["results"]}
        np.testing.assert_allclose([found[index] for index in range(8)], scores, rtol=0, atol=2e-6)

        large = json.dumps({"model": "cross", "query": "a", "documents": ["b " * 50] * 150}).encode()
        with ThreadPoolExecutor(120) as pool:

            def post(_):
                return service.request("POST", "/v1/rerank", large, Authorization="Bearer key")[0]

            assert set(pool.map(post, range(120))) == {200, 429}
            # Stop it while it works.
            answers = [pool.submit(post, None) for _ in range(50)]
            wait_for(lambda: sum(each.done() for each in answers) >= 25)
            waiting = [each for each in answers if not each.done()]
            assert waiting
            assert service.stop() == 0
            assert {each.result() for each in answers} <= {200, 429, 503}
            assert 200 in {each.result() for each in waiting}
    finally:
        service.process.kill()
    assert any("stopping: requests in flight are answered" in line for line in service.lines)


def test_a_port_that_is_taken_and_a_model_that_is_unsupported_are_errors(tmp_path, tokenizer):
    transformers.BertModel(transformers.BertConfig(hidden_size=48, num_attention_heads=3, num_hidden_layers=1,
                                                   intermediate_size=80)).save_pretrained(tmp_path)  # fmt: skip
    left = transformers.AutoTokenizer.from_pretrained(tokenizer.name_or_path, padding_side="left")
    left.save_pretrained(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [str(Path(sys.executable).with_name("fastbert")), "serve", str(tmp_path), "--port"]
        found = subprocess.run(
            [*command, str(taken.getsockname()[1])], check=False, capture_output=True, text=True, timeout=60
        )
    assert found.returncode == 2
    assert "Address already in use" in found.stderr
    service = Service(str(tmp_path))
    assert service.process.wait(120) == 2
    service._reading.join()
    assert service.lines[-1].endswith("Unsupported: padding_side='left' lets positions depend on the batch\n")
