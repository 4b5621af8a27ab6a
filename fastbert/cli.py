"""The command line: `fastbert verify`, `bench`, `encode`, `serve` and `info`.

torch and transformers take seconds to import. Only the commands import them, so `--help` answers at once.
"""

from collections.abc import Iterable
from enum import Enum
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

import fastbert

# Expected errors, of fastbert and its libraries: files, the hub, unsupported models, full devices. They become one line
# on stderr. Other errors, such as KeyError, are bugs and keep their traceback.
EXPECTED = (ImportError, OSError, RuntimeError, TypeError, ValueError)


class OneLineErrors(typer.core.TyperGroup):
    """A group of commands. An error prints one line on stderr and exits with 2, an interrupt with 130."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            message, status = "interrupted", 130
        except EXPECTED as error:
            message, status = " ".join(str(error).split()) or type(error).__name__, 2
        typer.echo(f"fastbert: {message}", err=True)
        raise typer.Exit(status)


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


class Dtype(str, Enum):
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A folder with config.json and weights, or a name on the Hugging Face hub.",
        show_default=False,
    ),
]  # fmt: skip
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="cpu, cuda, cuda:1 and so on; by default a GPU if there is one, else the CPU."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastbert {fastbert.__version__}")
        raise typer.Exit


def _examples(*commands: str) -> str:
    """The end of a command's help."""
    return "\n\n".join(("[bold]Examples[/]", *commands))


@app.callback(
    epilog=_examples(
        "fastbert info",
        "fastbert verify sentence-transformers/all-MiniLM-L6-v2",
        "fastbert bench ./my-model --dtype bfloat16",
        "fastbert encode sentence-transformers/all-MiniLM-L6-v2 texts.txt -o vectors.npy",
        "fastbert serve sentence-transformers/all-MiniLM-L6-v2",
    )
)
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """A drop-in BERT encoder: change one import, keep your weights, your code and your numbers."""


@app.command(
    epilog=_examples(
        "fastbert verify sentence-transformers/all-MiniLM-L6-v2",
        "fastbert verify ./my-model --device cuda:1 --dtype float16 --dtype bfloat16",
    )
)
def verify(
    model: Model,
    device: Device = None,
    dtype: Annotated[
        list[Dtype] | None, typer.Option(help="Repeat the option for several. By default all three.")
    ] = None,
) -> None:
    """Compare MODEL's outputs with transformers', class by class, before you trust fastbert with it.

    All eight classes and pooling run in both libraries on this machine, on
    real texts from one token to the model's limit, with padding on the right,
    on the left, in between and without, in float32, float16 and bfloat16. An
    error, measured against float64, may be three times transformers' error
    plus a few roundings. The exit status is 1 if an error is larger or a
    result is NaN. A dtype in which transformers itself gives NaN is named.
    """
    from fastbert.commands import verify as verifying

    dtypes = [each.value for each in dtype or Dtype]
    console, checkpoint, chosen = _started(model, device)
    steps = len(verifying.CLASSES) * len(dtypes)
    found = list(_tracked(verifying.verify(checkpoint, chosen, dtypes), "comparing", steps))
    console.print(verifying.table(found))
    for line in verifying.remarks(found):
        console.print(line)
    if not all(each.holds for each in found):
        raise typer.Exit(1)


@app.command(
    epilog=_examples(
        "fastbert bench sentence-transformers/all-MiniLM-L6-v2",
        "fastbert bench ./my-model --dtype bfloat16 --seconds 2",
    )
)
def bench(
    model: Model,
    device: Device = None,
    dtype: Annotated[Dtype, typer.Option(help="The dtype of the weights.")] = Dtype.FLOAT32,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Time per case: by default 5 on a CPU, 0.5 on a GPU.",
                                   show_default=False),
    ] = None,
) -> None:  # fmt: skip
    """Time MODEL's forward in fastbert and in transformers, with sdpa, on this machine.

    Batches are real texts, without padding and half of it. Rounds of both
    libraries alternate. "speed" is the median time of transformers divided
    by that of fastbert, so above 1 is faster. Results are checked before
    they are timed. On a GPU fastbert is timed with and without
    fastbert.graphed.
    """
    from fastbert.commands import benchmark

    console, checkpoint, chosen = _started(model, device)
    running = benchmark.Benchmark(checkpoint, chosen, dtype.value)
    console.print(f"{dtype.value}, back end: {running.backends}", highlight=False)
    measured = {}
    cases = running.cases()
    for case in _tracked(cases, "timing", len(cases)):
        measured[case] = running.measure(case, benchmark.SECONDS[chosen.type] if seconds is None else seconds)
    console.print(benchmark.table(measured))


@app.command(
    epilog=_examples(
        "fastbert encode sentence-transformers/all-MiniLM-L6-v2 texts.txt -o vectors.npy",
        "fastbert encode ./my-model texts.jsonl --field text -o vectors.parquet --dtype float16",
        "fastbert encode ./my-model 's3://bucket/*.parquet' --field text --ray -o s3://other/vectors",
    )
)
def encode(
    model: Model,
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="A file of UTF-8 text, one text per line.", show_default=False)
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="OUT",
                          help="The .npy or .parquet file to write; with --ray, a folder.", show_default=False)
    ],
    field: Annotated[
        str | None, typer.Option(metavar="NAME", help="Lines are JSON objects with the text in this field. The column "
                                                      "of Parquet files, by default text.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Text to put before each line; by default the model's prompt.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="The dtype of the weights; by default the checkpoint's.")] = None,
    device: Device = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum tokens of a batch: by default 16384, on a CPU 2048.",
                     show_default=False),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="INPUT is a folder, a pattern or a URI of Parquet files or files of lines, "
                                         "which several GPUs embed. OUT is a folder of Parquet files.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The Ray cluster, auto for the one of this machine; by "
                                                           "default the command starts one here.", show_default=False)
    ] = None,
) -> None:  # fmt: skip
    """Embed each line of INPUT as one vector in OUT, a .npy or .parquet file.

    The vectors are those of sentence-transformers' encode, with its prompts,
    pooling and normalizing. INPUT may be larger than memory. To continue an
    interrupted or killed run, repeat the command. A line that is not a text
    is reported and becomes a row of NaN; the exit status is then 1. The last
    lines tell where the time went.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    weights = None if dtype is None else getattr(torch, dtype.value)
    if ray:
        if device is not None:
            raise ValueError(f"--device {device}: with --ray, the cluster's GPUs are the devices")
        _encode_corpus(model, source, output, field=field, prompt=prompt, dtype=weights, tokens=tokens, address=address)
        return
    if address is not None:
        raise ValueError(f"--address {address} needs --ray")
    from fastbert.commands.encode import encode_file

    made = encode_file(model, source, output, field=field, prompt=prompt, dtype=weights, device=device, tokens=tokens)
    tokens_rate = f", {made.tokens_rate:,.0f} tokens/s" if made.tokens_rate else ""
    typer.echo(f"{output}: {made.dtype} [{made.lines}, {made.dim}], {made.rate:,.1f} texts/s{tokens_rate}")
    typer.echo("waited for " + ", ".join(f"{part} {seconds:.1f} s" for part, seconds in made.seconds.items()))
    if made.bad:
        more = f", and {made.bad - len(made.bad_lines):,} more" if made.bad > len(made.bad_lines) else ""
        typer.echo(f"rows of NaN, for lines that are not texts: {', '.join(map(str, made.bad_lines))}{more}")
        raise typer.Exit(1)


def _encode_corpus(model: str, source: str, output: str, **options) -> None:
    """`fastbert encode --ray`."""
    from fastbert.ray.corpus import encode_corpus

    made, rate = encode_corpus(model, source, output, **options, report=typer.echo)
    shown = f", {rate:,.1f} texts/s" if rate is not None else ""
    typer.echo(f"{output}: {made.dtype} [{made.rows}, {made.dim}], {made.files:,} files{shown}")
    if made.bad:
        for line in made.reported:
            typer.echo(line)
        typer.echo(f"rows without a vector, whose column error says why: {made.bad:,}")
        raise typer.Exit(1)


@app.command(
    epilog=_examples(
        "fastbert serve sentence-transformers/all-MiniLM-L6-v2",
        "FASTBERT_API_KEY=... fastbert serve ./my-model --host 0.0.0.0 --port 80 --name my-model",
    )
)
def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; 0.0.0.0 for clients on other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The TCP port.")] = 8000,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name for clients; by default the hub's, or the "
                                                      "folder's.", show_default=False)
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="The dtype of the weights; by default the checkpoint's.")] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut texts that are too long for the model, in place of an error.")
    ] = False,
    max_body: Annotated[int, typer.Option(min=1, help="Maximum bytes of a request.")] = 8388608,
    max_inputs: Annotated[int, typer.Option(min=1, help="Maximum texts of a request.")] = 2048,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of a request.")] = 131072,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Maximum batches of requests that wait; further ones get an error.")
    ] = 1024,
) -> None:  # fmt: skip
    """Serve MODEL over HTTP: /v1/embeddings as OpenAI's clients call it, or
    /v1/rerank if MODEL is a cross-encoder.

    Also /v1/models, /health and /metrics. If FASTBERT_API_KEY is set,
    clients must send it. On SIGINT or SIGTERM the requests in flight are
    answered before the command ends.
    """
    import torch

    from fastbert.commands.serve import run
    from fastbert.ray.protocol import Limits

    weights = None if dtype is None else getattr(torch, dtype.value)
    limits = Limits(max_body, max_inputs, max_tokens, max_queue)
    run(model, host, port, typer.echo, name=name, dtype=weights, truncate=truncate, limits=limits)


@app.command(epilog=_examples("fastbert info", "FASTBERT_BACKEND=eager fastbert info"))
def info() -> None:
    """Tell what runs here: versions, devices, kernels and why others do not run, settings and caches."""
    from fastbert.commands import information

    Console().print(information.table(), highlight=False)


def _started(model: str, device: str | None):
    """Print versions and device, and return the console, the `Checkpoint` and the torch.device of a command."""
    import huggingface_hub
    import transformers

    # Hide transformers' remarks on what it loads, but show the progress of downloads from the hub.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()
    from fastbert.commands.checkpoint import Checkpoint, select_device
    from fastbert.commands.machine import describe, machine

    console, chosen = Console(highlight=False), select_device(device)
    checkpoint = Checkpoint(model)
    console.print(f"fastbert {fastbert.__version__}, {describe(machine(chosen))}")
    if checkpoint.why_no_tokenizer:
        console.print(f"Random tokens instead of texts: no tokenizer can be loaded, {checkpoint.why_no_tokenizer}")
    return console, checkpoint, chosen


def _tracked(steps: Iterable, description: str, total: int) -> Iterable:
    """The steps, with a progress bar on a terminal."""
    console = Console(stderr=True)
    return track(steps, description, total=total, console=console, transient=True, disable=not console.is_terminal)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
