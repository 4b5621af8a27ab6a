"""`fastbert serve`: the service of `fastbert.ray.app` on this machine, until SIGINT or SIGTERM."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import torch

from fastbert.ray.service import DRAIN_SECONDS, app

# Below fastbert.ray, whose error says what to install.
import ray  # isort: skip
from ray import serve  # isort: skip

APPLICATION = "fastbert"
# A key on the command line would be seen in the list of processes.
KEY_VARIABLE = "FASTBERT_API_KEY"


def run(model: str, host: str, port: int, report: Callable[[str], None], **options: Any) -> None:
    """Serve a model until SIGINT or SIGTERM, then answer the requests in flight and stop.

    options: of `app`. If FASTBERT_API_KEY is set, clients must send it. Raises OSError if the port is taken or there is
    no such model, RuntimeError if the model cannot be served, and ValueError for wrong arguments.
    """
    _check_port(host, port)
    cpus = os.cpu_count() or 1
    actor = {"num_gpus": 1} if torch.cuda.is_available() else {"num_cpus": cpus}
    # Started again, a model that cannot be served would fail again.
    deployment: dict[str, Any] = {"ray_actor_options": actor, "max_constructor_retry_count": 1}
    application = app(model, api_key=os.environ.get(KEY_VARIABLE), **deployment, **options)
    ray.init(address="local", num_cpus=cpus, logging_level=logging.ERROR, log_to_driver=False)
    try:
        serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "ERROR"})
        try:
            serve.run(application, name=APPLICATION, logging_config={"log_level": "ERROR"})
        except RuntimeError as error:
            raise RuntimeError(f"{model} cannot be served: {_reason()}") from error
        stopped = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.set())
        report(f"{model} is served at http://{host}:{port}, until process {os.getpid()} gets SIGINT or SIGTERM")
        stopped.wait()
        report(f"stopping: requests in flight are answered, for at most {DRAIN_SECONDS} s")
        # Deleting the application would stop the model beside the frontend, which still needs it.
        serve.get_app_handle(APPLICATION).drain.remote(DRAIN_SECONDS).result()
    finally:
        serve.shutdown()
        ray.shutdown()


def _check_port(host: str, port: int) -> None:
    """Raise OSError if the port is taken: Ray tries again for ever."""
    with socket.create_server((host, port)):
        pass


def _reason() -> str:
    """Why the application does not run: the last lines of the replicas' tracebacks."""
    deployments = serve.status().applications[APPLICATION].deployments.values()
    return "; ".join(each.message.rstrip().splitlines()[-1] for each in deployments if each.message)
