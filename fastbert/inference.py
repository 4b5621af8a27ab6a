"""`encode` and `predict` of sentence-transformers on packed batches, with the next texts tokenized meanwhile.

The modules of sentence-transformers run on packed token embeddings [1, T, E] and cu_seqlens. An unsupported model or
call raises `Unsupported` with the reason; `fastbert.sentences` then runs sentence-transformers' own code.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import chain, pairwise
from operator import index
from threading import Event
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastbert import heads, model, patches
from fastbert._compat import CALLS_PROCESSOR, INFERENCE, RESOLVES_DEVICE, inference_device, is_compiled
from fastbert.fusion import class_name, fused_parts, has_hooks, why_no_block_is_fused
from fastbert.graphs import GraphedForward
from fastbert.layers import runs_packed
from fastbert.ops import backend
from fastbert.tokenization import PackedTokens, PackingTokenizer, Unsupported, why_only_wrapper
from fastbert.windows import CPU_TOKENS, TOKENS, Window, ahead, spans, window_of, window_of_tokens

# Class of a whole sentence-transformers model -> our class in its Transformer, and the modules that may follow it.
# Except Pooling, these run on one vector per text.
MODELS = {"SentenceTransformer": model.BertModel, "CrossEncoder": heads.BertForSequenceClassification}
FOLLOWING = {"SentenceTransformer": ("Pooling", "Dense", "Dropout", "LayerNorm", "Normalize"), "CrossEncoder": ()}
# Methods of sentence-transformers that packed batches bypass or change: none may be patched.
METHODS = ("forward", "preprocess", "tokenize", INFERENCE, *CALLS_PROCESSOR)
# Copying a tokenizer with MANY_ADDED added tokens takes as long as tokenizing FEW_TEXTS texts.
MANY_ADDED, FEW_TEXTS = 200, 200
# Options of the tokenizer that are supported.
OPTIONS = {"padding", "truncation", "max_length", "return_tensors"}
# Arguments of `encode` and `predict` for `preprocess` that are supported.
KEYWORDS = {"task", "processing_kwargs"}
# Attributes that other releases of sentence-transformers may lack.
ENCODER_ATTRIBUTES = (INFERENCE, RESOLVES_DEVICE)
TRANSFORMER_ATTRIBUTES = (
    "modality_config", "model_forward_params", "processing_kwargs", "query_expansion", "query_length",
    "document_length",
)  # fmt: skip


def why_unsupported(encoder: nn.Module) -> str | None:
    """Why texts never go packed through this model, whatever the arguments; None if they may."""
    transformer: Any
    after: list[Any]
    kind, (transformer, *after) = sentence_transformers_class(encoder), encoder.children()
    if kind not in MODELS:
        return f"it is a {class_name(encoder)}"
    if sentence_transformers_class(transformer) != "Transformer":
        return f"its first module is a {class_name(transformer)}"
    for module, names in ((encoder, ENCODER_ATTRIBUTES), (transformer, TRANSFORMER_ATTRIBUTES)):
        for name in names:
            if not hasattr(module, name):
                return f"a {class_name(module)} has no {name}, as sentence-transformers 6.2 has"
    if not _is_ours(vars(encoder).get(INFERENCE)):
        return "it was not given to fastbert.optimize as a whole, or its _inference is patched"
    for name, module in encoder.named_children():
        if module is not transformer and sentence_transformers_class(module) not in FOLLOWING[kind]:
            return f"module {name}, a {class_name(module)}, may look at padded batches"
    if sentence_transformers_class(next(iter(after), None)) != ("Pooling" if kind == "SentenceTransformer" else None):
        return "the first module is not followed by Pooling"
    for module in after:
        if getattr(module, "module_input_name", "sentence_embedding") != "sentence_embedding":
            return f"a {class_name(module)} takes {module.module_input_name}"
    for module in (encoder, transformer, *after):
        if reason := _why_not_original(module):
            return reason
    if "message" in transformer.modality_config or transformer.modality_config["text"]["method"] != "forward":
        return "it formats texts as chat messages"
    taken = transformer.model_forward_params
    if taken is not None and not {"cu_seq_lens_q", "max_length_q"} <= taken:
        return "its first module does not pass cu_seq_lens_q and max_length_q on"
    bert, expected = transformer.model, MODELS[kind]
    if type(bert) is not expected:
        return f"its model is a {class_name(bert)}, not a {class_name(expected)}"
    if vars(transformer.input_formatter).keys() & {"parse_inputs", "prepend_prompt_to_texts"}:
        return "its input_formatter is patched"
    return _why_wrong_device(bert.device) or why_needs_padding(bert) or why_only_wrapper(transformer.processor)


def sentence_transformers_class(module: nn.Module | None) -> str | None:
    """The class name of a module of sentence-transformers; None for any other module."""
    own = type(module).__module__.startswith("sentence_transformers.")
    return type(module).__name__ if own else None


def _is_ours(patched: object) -> bool:
    return type(patched).__module__.startswith("fastbert.")


def _why_not_original(module: nn.Module) -> str | None:
    """Why a module of sentence-transformers may not run its library's code; None if it does."""
    if has_hooks(module):
        return f"a {class_name(module)} has hooks"
    if is_compiled(module):
        return f"a {class_name(module)} is compiled"
    for name in METHODS:
        patched, function = vars(module).get(name), getattr(type(module), name, None)
        if patched is not None and not _is_ours(patched):
            return f"a {class_name(module)} has a patched {name}"
        if function is not None and not _is_written_in(function, "sentence_transformers"):
            return f"{class_name(module)}.{name} is patched for every model"
    return None


def _is_written_in(function: Callable, package: str) -> bool:
    """Whether a function is defined in a package. Looks through a decorator of torch, but not at `__module__`, which
    functools.wraps copies."""
    code = getattr(function, "__code__", None)
    if code is not None and _is_in(code.co_filename, "torch"):
        code = getattr(getattr(function, "__wrapped__", None), "__code__", None)
    return code is not None and _is_in(code.co_filename, package)


def _is_in(path: str, package: str) -> bool:
    return path.startswith(os.path.dirname(str(sys.modules[package].__file__)) + os.sep)


def why_needs_padding(bert: nn.Module) -> str | None:
    """Why a model needs padded batches; None if packed ones are faster. An unfused block would see all packed sequences
    as a single one, with a mask of [T, T]."""
    if has_hooks(bert) or not isinstance(vars(bert).get("forward"), GraphedForward | None):
        return "its model has hooks or a patched forward"
    base: model.BertModel = bert.base_model  # type: ignore[assignment]
    if is_compiled(bert) or is_compiled(base):
        return "its model is compiled"
    if base is not bert and (has_hooks(base) or "forward" in vars(base)):
        return "its encoder has hooks or a patched forward"
    reason = why_no_block_is_fused() or patches.replaced_in_models() or patches.replaced_for_masks(base)
    if reason:
        return reason
    if base.config.output_hidden_states or base.config.output_attentions:
        return "the configuration asks for hidden states or attention weights"
    if base.config.is_decoder or not runs_packed(base.encoder):
        return "its encoder needs padded batches"
    if len({x.dtype for x in base.embeddings.parameters()}) > 1:
        return "its embeddings have several dtypes"
    blocks: list[nn.Module] = [base.embeddings, *base.encoder.layer]
    blocks += [] if base.pooler is None else [base.pooler]
    return next(filter(None, (fused_parts(block, fusable=True)[1] for block in blocks)), None)


def _why_wrong_device(device: torch.device) -> str | None:
    """Why packed batches are not supported on a device; None if they are."""
    if device.type == "cpu" or (device.type == "cuda" and backend.packs_on_device(device)):
        return None
    return f"no kernel packs on {device}"


@torch.inference_mode()
def encode(
    encoder: nn.Sequential, inputs: list, *, prompt: str | None, batch_size: int, show_progress_bar: bool,
    output_value: str | None, save_to_cpu: bool, normalize_embeddings: bool, truncate_dim: int | None,
    device: str | torch.device | None = None, **kwargs,
) -> Tensor | list[Tensor]:  # fmt: skip
    """SentenceTransformer._inference: vectors [N, dim] on the host or device, or N token embeddings of [S, E]."""
    if output_value not in ("sentence_embedding", "token_embeddings"):
        raise Unsupported(f"output_value={output_value!r} is asked for")
    packed = PackedEncoder(encoder, len(inputs), _are_pairs(inputs), prompt, batch_size, device, **kwargs)
    if output_value == "token_embeddings":
        return _token_embeddings(packed, inputs, show_progress_bar)
    rows = Rows(len(inputs), torch.device("cpu") if save_to_cpu else packed.device)
    for window, outputs in _outputs(packed, inputs, "sentence_embedding", show_progress_bar):
        vectors = torch.cat(outputs)
        if truncate_dim is not None:
            vectors = vectors[:, :truncate_dim]
        rows.put(window.rows, F.normalize(vectors, dim=1) if normalize_embeddings else vectors)
    return rows.filled()


def _token_embeddings(packed: "PackedEncoder", inputs: list, show_progress_bar: bool) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    for window, outputs in _outputs(packed, inputs, "token_embeddings", show_progress_bar):
        lengths = (window.lengths[first:last].tolist() for first, last in pairwise(window.cuts))
        texts = chain.from_iterable(x[0].split(size) for x, size in zip(outputs, lengths, strict=True))
        found.update(zip(window.rows.tolist(), texts, strict=True))
    return [found[row] for row in range(len(inputs))]


@torch.inference_mode()
def predict(
    encoder: nn.Sequential, inputs: list, *, prompt: str | None, batch_size: int, show_progress_bar: bool,
    activation_fn: Callable | None, apply_softmax: bool | None, device: str | torch.device | None = None, **kwargs,
) -> Tensor:  # fmt: skip
    """CrossEncoder._inference: scores [N], or [N, labels] with several labels, on the device."""
    packed = PackedEncoder(encoder, len(inputs), _are_pairs(inputs), prompt, batch_size, device, **kwargs)
    rows = Rows(len(inputs), packed.device)
    for window, outputs in _outputs(packed, inputs, "scores", show_progress_bar):
        scores = torch.cat(outputs)
        scores = scores.float() if scores.dtype.itemsize < 4 else scores
        scores = scores if activation_fn is None else activation_fn(scores)
        if encoder.num_labels == 1 and scores.ndim > 1:
            scores = scores.squeeze(-1)
        rows.put(window.rows, scores.softmax(1) if apply_softmax and scores.ndim > 1 else scores)
    return rows.filled()


def _outputs(
    packed: "PackedEncoder", inputs: list, name: str, show_progress_bar: bool
) -> Iterator[tuple[Window, list[Tensor]]]:
    """Yield each window of the inputs, with the output of this name of each of its batches."""

    def job(start: int, stop: int, stopped: Event) -> Window | None:
        return packed.window(inputs[start:stop], start, stopped)

    bar = tqdm(total=len(inputs), desc="Texts", unit=" texts", disable=not show_progress_bar)
    with bar, closing(ahead(partial(job, *span) for span in spans(len(inputs)))) as found:
        for window in found:
            outputs = []
            for count, given in window.batches(packed.device):
                # Keep only this output until the end of the window.
                outputs.append(packed.features(given)[name])
                bar.update(count)
            yield window, outputs


class PackedEncoder:
    """Runs a sentence-transformers model on windows of packed texts instead of padded batches.

    count: the number of inputs. paired: inputs are pairs of texts. prompt: put before each input. batch_size and
    max_tokens: see `windows.window_of`; max_tokens is TOKENS or CPU_TOKENS by default. device: None means the model's.
    kwargs: further arguments of `encode` and `predict`, for `preprocess`. Attributes: device, tokenizer and max_tokens.

    Puts the model in eval mode. Raises Unsupported if only sentence-transformers' own code supports the model or the
    arguments, and what sentence-transformers and its tokenizer raise.
    """

    def __init__(
        self, encoder: nn.Sequential, count: int, paired: bool, prompt: str | None, batch_size: int,
        device: str | torch.device | None = None, max_tokens: int | None = None, **kwargs,
    ):  # fmt: skip
        if others := kwargs.keys() - KEYWORDS:
            raise Unsupported(f"{', '.join(sorted(others))} is given")
        index(batch_size)  # raises what range(0, N, batch_size) raises
        if any(module.training for module in encoder.modules()):  # three times as fast as eval()
            encoder.eval()
        if reason := why_unsupported(encoder):
            raise Unsupported(reason)
        self.device = inference_device(encoder, device)
        if reason := _why_wrong_device(self.device):
            raise Unsupported(reason)
        transformer: Any = encoder[0]
        options = _options(transformer, **kwargs)
        added = len(transformer.processor.backend_tokenizer.get_added_tokens_decoder())
        if added > MANY_ADDED and count < FEW_TEXTS:
            raise Unsupported(f"copying {added} added tokens takes longer than tokenizing few texts")
        self.tokenizer = PackingTokenizer(transformer.processor, **options)
        self._constant: dict[str, Any] = {"modality": "text"}
        if prompt and not all(getattr(module, "include_prompt", True) for module in encoder.children()):
            if options != _options(transformer):
                raise Unsupported("the pooling leaves a prompt out and the call sets a max_length")
            self._constant["prompt_length"] = self._length_of(prompt, transformer.processor.all_special_ids)
        self._encoder, self._kwargs = encoder, kwargs
        self._paired, self._prompt, self._batch_size = paired, prompt, batch_size
        self.max_tokens = max_tokens or (CPU_TOKENS if self.device.type == "cpu" else TOKENS)

    def _length_of(self, prompt: str, special_ids: list[int]) -> int:
        """The number of a prompt's tokens without a special token at its end, as sentence-transformers counts them."""
        ids = self.tokenizer([prompt]).input_ids
        return len(ids) - (len(ids) > 0 and ids[-1] in special_ids)

    def window(self, inputs: list, first: int, stopped: Event) -> Window | None:
        """Tokenize inputs into a window; first is the index of the first one. Returns None if `stopped` was set."""
        texts = inputs
        if self._prompt:
            texts = [(self._prompt + a, b) for a, b in inputs] if self._paired else [self._prompt + x for x in inputs]
        window = window_of(self.tokenizer, texts, first, self._batch_size, self.max_tokens, stopped)
        if window is not None and not window.lengths[-1]:
            raise Unsupported("a text has no tokens")
        return window

    def window_of_tokens(self, chunks: Sequence[PackedTokens]) -> Window:
        """Join the tokens of texts into a window; chunks are N texts in all, and its rows are their indices."""
        return window_of_tokens(chunks, 0, self._batch_size, self.max_tokens)

    def features(self, given: dict) -> dict:
        """Run the model on a batch of a window, T tokens of N texts. Returns sentence_embedding [N, dim], scores
        [N, labels] or token_embeddings [1, T, E]."""
        return self._encoder(given | self._constant, **self._kwargs)


def _are_pairs(inputs: list) -> bool:
    """Whether the inputs are pairs of texts. Raises Unsupported unless they all are pairs, or all texts."""
    if not inputs:
        raise Unsupported("")
    if all(isinstance(x, str) for x in inputs):
        return False
    if all(isinstance(x, tuple | list) and len(x) == 2 and all(isinstance(y, str) for y in x) for x in inputs):
        return True
    raise Unsupported("the inputs are neither all texts nor all pairs of texts")


def _options(transformer: Any, task: str | None = None, processing_kwargs: dict | None = None) -> dict:
    """The options with which sentence-transformers' Transformer calls its tokenizer, without return_tensors."""
    if task == "query" and transformer.query_expansion is not None:
        raise Unsupported("queries are expanded by sentence-transformers")
    if others := (processing_kwargs or {}).keys() - {"text", "common"}:
        raise Unsupported(f"processing_kwargs holds {', '.join(map(str, others))}")
    options: dict[str, Any] = {"padding": True, "truncation": "longest_first", "return_tensors": "pt"}
    lengths = {"query": transformer.query_length, "document": transformer.document_length}
    if task is not None and lengths.get(task) is not None:
        options["max_length"] = lengths[task]
    for kind in ("text", "common"):
        for given in (transformer.processing_kwargs, processing_kwargs or {}):
            options |= given.get(kind) or {}
    if others := options.keys() - OPTIONS:
        raise Unsupported(f"the tokenizer is called with {', '.join(others)}")
    if options.pop("return_tensors") != "pt":
        raise Unsupported("another return_tensors than 'pt' is asked for")
    return options


class Rows:
    """A tensor [count, ...] that windows fill in any order. Copies from a GPU overlap with the next window."""

    def __init__(self, count: int, device: torch.device):
        self._count, self._device = count, device
        self._rows: Tensor | None = None
        self._pending: tuple[np.ndarray, Callable[[], Tensor]] | None = None

    def put(self, rows: np.ndarray, values: Tensor) -> None:
        """Set row rows[i] to values[i]. rows: int64 [n]; values: [n, ...]."""
        if self._rows is None:
            self._rows = torch.empty(self._count, *values.shape[1:], dtype=values.dtype, device=self._device)
        if values.device == self._device:
            self._rows.index_copy_(0, torch.from_numpy(rows).to(self._device, non_blocking=True), values)
            return
        arriving = to_host(values)
        self._collect()
        self._pending = rows, arriving

    def _collect(self) -> None:
        if self._pending is not None and self._rows is not None:
            rows, arriving = self._pending
            self._rows.index_copy_(0, torch.from_numpy(rows), arriving())
            self._pending = None

    def filled(self) -> Tensor:
        """The tensor, once all rows were put."""
        self._collect()
        assert self._rows is not None
        return self._rows


def to_host(values: Tensor) -> Callable[[], Tensor]:
    """Start to copy values to pinned host memory. Returns a function that waits for the copy and returns it."""
    if values.device.type == "cpu":
        return lambda: values
    # The device is given because torch's default device may be another one.
    on_host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
    done = torch.cuda.Event()
    on_host.copy_(values, non_blocking=True)
    done.record(torch.cuda.current_stream(values.device))

    def arrived() -> Tensor:
        done.synchronize()
        return on_host

    return arrived
