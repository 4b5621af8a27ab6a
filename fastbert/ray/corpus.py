"""`fastbert encode --ray`: the vectors of a folder or bucket of files, computed by the actors of Ray Data."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext

import fastbert
from fastbert.commands.checkpoint import local_or_hub
from fastbert.commands.encode import REPORTED_LINES, identity
from fastbert.commands.encode import load as load_model
from fastbert.ray.embed import Embed
from fastbert.ray.files import Contents, Corpus, nested
from fastbert.ray.inputs import ERROR, VECTOR, find, resolve

# Rows of a part, which an actor embeds at once and a killed run may lose: as many texts as are sorted together.
PART_ROWS = 16384
# Ray's CPUs for an actor, and for a task that reads or writes: of both kinds one fits on each CPU.
ACTOR_CPUS, TASK_CPUS = 0.75, 0.25
# Ray appends this, and advice on its settings, to the message of an error.
RAYS_ADVICE = "Failed to apply UDF transform"


def encode_corpus(
    model: str,
    source: str,
    output: str,
    *,
    field: str | None = None,
    prompt: str | None = None,
    dtype: torch.dtype | None = None,
    tokens: int | None = None,
    address: str | None = None,
    part_rows: int = PART_ROWS,
    report: Callable[[str], None] = print,
) -> tuple[Contents, float | None]:
    """Embed every row of the input files on a Ray cluster, with an actor for each of its GPUs, or else for each CPU.

    The output is a folder with a folder for each input file. Its Parquet files have a row for each row of the input, in
    order: "file", its name; "row", int64, counted from 0; "vector", a list of dim float32 or float16 numbers, or null;
    "error", a string, why there is no vector. A call with the same arguments continues a killed run and embeds files
    that were added; finished files are not read again. Returns what the output holds, and the texts per second, None if
    there was nothing to do.

    model: a folder that every machine has, or a name on the hub. source: a file, a folder, or a pattern such as
    s3://bucket/*.parquet, of what `inputs.parts` reads. output: a folder, or its URI; every machine must reach both.
    field: the texts' field or column. prompt, dtype, tokens: see `Embed`. address: of a Ray cluster; None starts one on
    this machine, unless Ray runs in this process already. report: receives each line for the user.

    Raises OSError for files that cannot be read or written; RuntimeError if an input changes meanwhile, a machine has
    another model of this name, or a batch does not fit on the device; ValueError if the output was made from something
    else, if the first file holds no text, and for wrong arguments; TypeError if a column does not hold strings; and
    what loading raises.
    """
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens={tokens}: it must be at least 1")
    corpus = Corpus(find(source), *resolve(output), field, part_rows)
    corpus.check_first_file()
    encoder = load_model(local_or_hub(model), "cpu", report)
    if prompt is None and encoder.default_prompt_name is not None:
        prompt = encoder.prompts.get(encoder.default_prompt_name)
    if dtype is not None:
        encoder.to(dtype)
    fastbert.optimize(encoder)
    expected = identity(encoder)
    made_from = {"field": field, "prompt": prompt, "rows of a part": part_rows}
    todo = corpus.begin(made_from | {"dtype": str(encoder.dtype), "model": expected})
    if len(todo) < len(corpus.sources):
        report(f"{len(corpus.sources) - len(todo):,} of {len(corpus.sources):,} files are finished already")
    rate = None
    if todo:
        # The actors may have another working directory.
        path = str(Path(model).absolute()) if Path(model).is_dir() else model
        options = {"model": path, "prompt": prompt, "dtype": dtype, "tokens": tokens}
        try:
            with _cluster(address):
                rate = _run(corpus, todo, options, expected)
        except KeyboardInterrupt:
            report("what is written stays: repeat the command to continue")
            raise
    corpus.tidy()
    return corpus.contents(REPORTED_LINES), rate


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Join a cluster, or start one on this machine. Leave it at the end, unless it was joined before."""
    joined = ray.is_initialized()
    if not joined:
        ray.init(address=address or "local")
    context = DataContext.get_current()
    before = context.target_max_block_size, context.raise_original_map_exception
    # Ray joins rows to blocks of this many bytes, and an actor gets a block at a time: make it a part.
    context.target_max_block_size = 1
    context.raise_original_map_exception = True
    try:
        yield
    except ray.exceptions.RayError as error:
        raise _own_error(error) from None
    finally:
        context.target_max_block_size, context.raise_original_map_exception = before
        if not joined:
            ray.shutdown()


def _own_error(error: ray.exceptions.RayError) -> BaseException:
    """Our own code's error in one of Ray's, whose message is a traceback."""
    own = getattr(error, "cause", None)
    if own is None:  # an actor that could not be created: the traceback ends with its error
        lines = str(error).partition(RAYS_ADVICE)[0].split("\n")
        return RuntimeError(next(filter(str.strip, reversed(lines)), type(error).__name__))
    cleaned = [arg.partition(RAYS_ADVICE)[0].rstrip() if isinstance(arg, str) else arg for arg in own.args]
    # An error of the operating system has its number and its text as arguments.
    return type(own)(*(arg for arg in cleaned if arg != ""))


def _run(corpus: Corpus, todo: list[tuple[int, list[int]]], options: dict, expected: str) -> float:
    """Embed the parts that are missing. todo: the index of each file, and the first rows of its parts that exist.
    options: of `Embed`. expected: the model's identity. Returns the texts per second."""
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    actors = ActorPoolStrategy(min_size=1, max_size=gpus or max(1, int(resources.get("CPU", 1))))
    files = ray.data.from_items([{"file": index, "done": done} for index, done in todo], override_num_blocks=len(todo))
    written = (
        files.map_batches(corpus.read, batch_size=1, batch_format="pyarrow", num_cpus=TASK_CPUS)
        .map_batches(
            _EmbedParts, fn_constructor_args=[options, expected], batch_size=1, batch_format="pyarrow",
            compute=actors, num_gpus=1 if gpus else 0, num_cpus=ACTOR_CPUS,
        )
        .map_batches(corpus.write, batch_size=1, batch_format="pyarrow", num_cpus=TASK_CPUS)
    )  # fmt: skip
    begun = time.perf_counter()
    rows = sum(row["rows"] for row in written.iter_rows())
    return rows / (time.perf_counter() - begun)


class _EmbedParts:
    """Embeds the texts of a part, which is one row of the dataset, so that Ray never divides it."""

    def __init__(self, options: dict, expected: str):
        self._embed = Embed(**options)
        if identity(self._embed.encoder) != expected:
            raise RuntimeError(f"{options['model']} on {ray.util.get_node_ip_address()} is another model than here")

    def __call__(self, batch: pa.Table) -> pa.Table:
        part = batch.to_pylist()[0]
        reasons = {row: reason for row, reason in enumerate(part["reasons"]) if reason is not None}
        vectors, errors = self._embed.vectors(part["texts"], reasons)
        columns = {"file": pa.array([part["file"]]), "first": pa.array([part["first"]])}
        return pa.table(columns | {VECTOR: nested(vectors), ERROR: nested(errors)})
