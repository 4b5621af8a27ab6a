"""A service on Ray Serve, which queues, batches, routes and scales.

Frontends speak HTTP and tokenize; models compute. A request is cut into pieces of at most the tokens of a batch, so
that replicas share long requests, and pieces of several requests share a batch.
"""

from pathlib import Path
from typing import Any

import torch
from ray import serve

from fastbert.commands.checkpoint import Checkpoint
from fastbert.ray.frontend import Frontend
from fastbert.ray.protocol import Limits
from fastbert.ray.replica import Model, Settings
from fastbert.windows import CPU_TOKENS

# Seconds that requests in flight have when a replica is stopped.
DRAIN_SECONDS = 30
# How many pieces a replica of the model accepts before they queue.
PIECES = 256
# How many requests a frontend accepts. Ray answers further ones itself, in plain text.
REQUESTS = 10_000


def app(
    model: str,
    *,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    truncate: bool = False,
    api_key: str | None = None,
    limits: Limits = Limits(),  # noqa: B008
    frontends: int = 1,
    **deployment: Any,
) -> serve.Application:
    """An application for `serve.run`: /v1/embeddings of an embedding model, or /v1/rerank of a cross-encoder.

    model: a folder that every machine has, or a name on the hub. It ranks if it is a BertForSequenceClassification.
    name: the one that clients give; by default the hub's, or the folder's. dtype: of the weights; by default the
    checkpoint's. truncate: cut longer texts, as `encode` does, in place of an error. api_key: what clients must send;
    by default none. frontends: the number of processes that speak HTTP and tokenize. deployment: options of
    `serve.deployment` for the model, such as num_replicas, autoscaling_config and ray_actor_options; by default a
    replica has one GPU if this machine has any, else one CPU.

    Raises OSError if there is no such model, ValueError for wrong arguments. A replica raises what loading raises.
    """
    pieces = limits.tokens // CPU_TOKENS + 1
    if limits.queue < pieces:
        raise ValueError(f"queue={limits.queue}: a request of {limits.tokens:,} tokens may be {pieces} pieces itself")
    config = Checkpoint(model).config
    ranks = "BertForSequenceClassification" in (config.architectures or ())
    if ranks and config.num_labels != 1:
        raise ValueError(f"{model} has {config.num_labels} labels: only a cross-encoder with one can rank documents")
    if Path(model).is_dir():  # replicas may have another working directory
        model = str(Path(model).absolute())
        name = name or Path(model).name
    name = name or model
    settings = Settings(model, name, ranks, dtype, truncate, api_key, limits)
    defaults = {
        "ray_actor_options": {"num_gpus" if torch.cuda.is_available() else "num_cpus": 1},
        "max_ongoing_requests": PIECES,
        "max_queued_requests": limits.queue,
        "graceful_shutdown_timeout_s": DRAIN_SECONDS,
    }
    deployed: Any = serve.deployment  # its types know decorators alone
    models = deployed(Model, **(defaults | deployment)).bind(settings)
    entrance = deployed(
        serve.ingress()(Frontend), num_replicas=frontends, max_ongoing_requests=REQUESTS,
        graceful_shutdown_timeout_s=DRAIN_SECONDS, ray_actor_options={"num_cpus": 0},
    )  # fmt: skip
    return entrance.bind(settings, models)
