"""`encode` and `predict` of sentence-transformers at the device's speed: packed batches of texts tokenized ahead.

The modules do their own work on what is packed, [1, T, E] and the bounds of the texts. What this does not serve raises
`Unserved` with the reason, and goes through sentence-transformers' own code as it is.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import chain, pairwise
from operator import index
from threading import Event

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
from fastbert.tokenization import PackingTokenizer, Unserved, why_wrapper
from fastbert.windows import CPU_TOKENS, TOKENS, Window, ahead, spans, window_of

# The class of a whole model of sentence-transformers' -> ours in its Transformer, and the modules that may follow. Of
# these, all but Pooling look at one vector a text.
MODELS = {"SentenceTransformer": model.BertModel, "CrossEncoder": heads.BertForSequenceClassification}
AFTER = {"SentenceTransformer": ("Pooling", "Dense", "Dropout", "LayerNorm", "Normalize"), "CrossEncoder": ()}
# Its methods that a call goes through, and through which it does not go in packed batches.
METHODS = ("forward", "preprocess", "tokenize", INFERENCE, *CALLS_PROCESSOR)
# Added tokens that take as long to copy as tokenizing so many texts.
MANY_ADDED, FEW_TEXTS = 200, 200
OPTIONS = {"padding", "truncation", "max_length", "return_tensors"}
# What `encode` and `predict` may be given for `preprocess`.
KEYWORDS = {"task", "processing_kwargs"}
# What not every release of sentence-transformers may have.
OF_ENCODERS = (INFERENCE, RESOLVES_DEVICE)
OF_TRANSFORMERS = (
    "modality_config", "model_forward_params", "processing_kwargs", "query_expansion", "query_length",
    "document_length",
)  # fmt: skip


def why_unserved(encoder: nn.Module) -> str | None:
    """Why texts go through sentence-transformers' own code whatever the arguments; None if they need not."""
    kind, (transformer, *after) = kind_of(encoder), encoder.children()
    if kind not in MODELS:
        return f"it is a {class_name(encoder)}"
    if kind_of(transformer) != "Transformer":
        return f"its first module is a {class_name(transformer)}"
    for module, names in ((encoder, OF_ENCODERS), (transformer, OF_TRANSFORMERS)):
        for name in names:
            if not hasattr(module, name):
                return f"a {class_name(module)} has no {name}, as sentence-transformers 6.2 has"
    if not _is_ours(vars(encoder).get(INFERENCE)):
        return "it was not given to fastbert.optimize as a whole, or its _inference is somebody's"
    for name, module in encoder.named_children():
        if module is not transformer and kind_of(module) not in AFTER[kind]:
            return f"module {name}, a {class_name(module)}, may look at padded batches"
    if kind_of(next(iter(after), None)) != ("Pooling" if kind == "SentenceTransformer" else None):
        return "the first module is not followed by Pooling"
    for module in after:
        if getattr(module, "module_input_name", "sentence_embedding") != "sentence_embedding":
            return f"a {class_name(module)} takes {module.module_input_name}"
    for module in (encoder, transformer, *after):
        if reason := _why_not_its_own(module):
            return reason
    if "message" in transformer.modality_config or transformer.modality_config["text"]["method"] != "forward":
        return "its texts are messages"
    taken = transformer.model_forward_params
    if taken is not None and not {"cu_seq_lens_q", "max_length_q"} <= taken:
        return "its first module hands no bounds of packed texts on"
    bert, expected = transformer.model, MODELS[kind]
    if type(bert) is not expected:
        return f"its model is a {class_name(bert)}, not a {class_name(expected)}"
    if vars(transformer.input_formatter).keys() & {"parse_inputs", "prepend_prompt_to_texts"}:
        return "its input_formatter is patched"
    return _why_not_on(bert.device) or why_padded(bert) or why_wrapper(transformer.processor)


def kind_of(module: nn.Module | None) -> str | None:
    """The name of a class of sentence-transformers' own."""
    own = type(module).__module__.startswith("sentence_transformers.")
    return type(module).__name__ if own else None


def _is_ours(patched: object) -> bool:
    return type(patched).__module__.startswith("fastbert.")


def _why_not_its_own(module: nn.Module) -> str | None:
    """Why a module of sentence-transformers' might do something of somebody's."""
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
    """Whether a function's code is of a package, or under a decorator of torch's: functools.wraps changes neither."""
    code = getattr(function, "__code__", None)
    if code is not None and _is_in(code.co_filename, "torch"):
        code = getattr(getattr(function, "__wrapped__", None), "__code__", None)
    return code is not None and _is_in(code.co_filename, package)


def _is_in(path: str, package: str) -> bool:
    return path.startswith(os.path.dirname(sys.modules[package].__file__) + os.sep)


def why_padded(bert: nn.Module) -> str | None:
    """Why a model needs padded batches: what is no fused block sees all texts as one, with a mask of [T, T]."""
    if has_hooks(bert) or not isinstance(vars(bert).get("forward"), GraphedForward | None):
        return "its model has hooks or a patched forward"
    base = bert.base_model
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
        return "its embeddings are of several dtypes"
    blocks = [base.embeddings, *base.encoder.layer]
    blocks += [] if base.pooler is None else [base.pooler]
    return next(filter(None, (fused_parts(block, fusable=True)[1] for block in blocks)), None)


def _why_not_on(device: torch.device) -> str | None:
    if device.type == "cpu" or (device.type == "cuda" and backend.packs_on_device(device)):
        return None
    return f"no kernel packs on {device}"


@torch.inference_mode()
def encode(
    encoder: nn.Module, inputs: list, *, prompt: str | None, batch_size: int, show_progress_bar: bool,
    output_value: str | None, save_to_cpu: bool, normalize_embeddings: bool, truncate_dim: int | None,
    device: str | torch.device | None = None, **kwargs,
) -> Tensor | list[Tensor]:  # fmt: skip
    """SentenceTransformer._inference: vectors [N, dim] on the host or the device, or token embeddings, N of [S, E]."""
    if output_value not in ("sentence_embedding", "token_embeddings"):
        raise Unserved(f"output_value={output_value!r} is asked for")
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
    found: list[Tensor | None] = [None] * len(inputs)
    for window, outputs in _outputs(packed, inputs, "token_embeddings", show_progress_bar):
        lengths = (window.lengths[first:last].tolist() for first, last in pairwise(window.cuts))
        texts = chain.from_iterable(x[0].split(size) for x, size in zip(outputs, lengths, strict=True))
        for row, embeddings in zip(window.rows.tolist(), texts, strict=True):
            found[row] = embeddings
    return found


@torch.inference_mode()
def predict(
    encoder: nn.Module, inputs: list, *, prompt: str | None, batch_size: int, show_progress_bar: bool,
    activation_fn: Callable | None, apply_softmax: bool | None, device: str | torch.device | None = None, **kwargs,
) -> Tensor:  # fmt: skip
    """CrossEncoder._inference: scores [N], or [N, labels] of several labels, on the device."""
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
    """The windows of the inputs, each with the feature of this name that each of its batches ends with."""

    def job(start: int, stop: int, stopped: Event) -> Window | None:
        return packed.window(inputs[start:stop], start, stopped)

    bar = tqdm(total=len(inputs), desc="Texts", unit=" texts", disable=not show_progress_bar)
    with bar, closing(ahead(partial(job, *span) for span in spans(len(inputs)))) as found:
        for window in found:
            outputs = []
            for count, given in window.batches(packed.device):
                # Only what is asked for is kept until the window's end.
                outputs.append(packed.features(given)[name])
                bar.update(count)
            yield window, outputs


class PackedEncoder:
    """A model of sentence-transformers', as it is now, that is given windows of texts in the place of padded batches.

    count: of inputs. paired: whether one is a pair of texts. prompt: put before each input. batch_size and most_tokens:
    see `windows.window_of`; most_tokens is TOKENS or CPU_TOKENS by default. device: None for the model's. kwargs: what
    else `encode` and `predict` take for sentence-transformers' `preprocess`.

    Puts the model in eval mode. Raises Unserved where sentence-transformers' own code has to do the work, and what
    sentence-transformers and its tokenizer raise.
    """

    def __init__(
        self, encoder: nn.Module, count: int, paired: bool, prompt: str | None, batch_size: int,
        device: str | torch.device | None = None, most_tokens: int | None = None, **kwargs,
    ):  # fmt: skip
        if others := kwargs.keys() - KEYWORDS:
            raise Unserved(f"{', '.join(sorted(others))} is given")
        index(batch_size)  # raises as the range of batches does
        if any(module.training for module in encoder.modules()):  # asking takes a third of setting
            encoder.eval()
        if reason := why_unserved(encoder):
            raise Unserved(reason)
        self.device = inference_device(encoder, device)
        if reason := _why_not_on(self.device):
            raise Unserved(reason)
        transformer = encoder[0]
        options = _options(transformer, **kwargs)
        added = len(transformer.processor.backend_tokenizer.get_added_tokens_decoder())
        if added > MANY_ADDED and count < FEW_TEXTS:
            raise Unserved(f"{added} added tokens take longer to copy than few texts to tokenize")
        self._tokenizer = PackingTokenizer(transformer.processor, **options)
        self._constant = {"modality": "text"}
        if prompt and not all(getattr(module, "include_prompt", True) for module in encoder.children()):
            if options != _options(transformer):
                raise Unserved("a prompt is left out where the call has a max_length of its own")
            self._constant["prompt_length"] = self._length_of(prompt, transformer.processor.all_special_ids)
        self._encoder, self._kwargs = encoder, kwargs
        self._paired, self._prompt, self._batch_size = paired, prompt, batch_size
        self._most_tokens = most_tokens or (CPU_TOKENS if self.device.type == "cpu" else TOKENS)

    def _length_of(self, prompt: str, special_ids: list[int]) -> int:
        """The tokens of a prompt without the special one at its end, as sentence-transformers counts them."""
        ids = self._tokenizer([prompt]).input_ids
        return len(ids) - (len(ids) > 0 and ids[-1] in special_ids)

    def window(self, inputs: list, first: int, stopped: Event) -> Window | None:
        """The window of inputs of which the first is at that place among all; None if it was stopped meanwhile."""
        texts = inputs
        if self._prompt:
            texts = [(self._prompt + a, b) for a, b in inputs] if self._paired else [self._prompt + x for x in inputs]
        window = window_of(self._tokenizer, texts, first, self._batch_size, self._most_tokens, stopped)
        if window is not None and not window.lengths[-1]:
            raise Unserved("a text has no token at all")
        return window

    def features(self, given: dict) -> dict:
        """What the model's modules make of a batch of a window's, [T] tokens of N texts: sentence_embedding [N, dim],
        scores [N, labels], token_embeddings [1, T, E]."""
        return self._encoder(given | self._constant, **self._kwargs)


def _are_pairs(inputs: list) -> bool:
    """Whether the inputs are pairs of texts. Raises Unserved for what is neither pairs nor texts alone."""
    if not inputs:
        raise Unserved("")
    if all(isinstance(x, str) for x in inputs):
        return False
    if all(isinstance(x, tuple | list) and len(x) == 2 and all(isinstance(y, str) for y in x) for x in inputs):
        return True
    raise Unserved("the inputs are neither texts alone nor pairs of texts alone")


def _options(transformer: nn.Module, task: str | None = None, processing_kwargs: dict | None = None) -> dict:
    """What sentence-transformers' Transformer calls its tokenizer with, but for the kind of tensors."""
    if task == "query" and transformer.query_expansion is not None:
        raise Unserved("queries are expanded by sentence-transformers")
    if others := (processing_kwargs or {}).keys() - {"text", "common"}:
        raise Unserved(f"processing_kwargs holds {', '.join(map(str, others))}")
    options = {"padding": True, "truncation": "longest_first", "return_tensors": "pt"}
    lengths = {"query": transformer.query_length, "document": transformer.document_length}
    if lengths.get(task) is not None:
        options["max_length"] = lengths[task]
    for kind in ("text", "common"):
        for given in (transformer.processing_kwargs, processing_kwargs or {}):
            options |= given.get(kind) or {}
    if others := options.keys() - OPTIONS:
        raise Unserved(f"the tokenizer is called with {', '.join(others)}")
    if options.pop("return_tensors") != "pt":
        raise Unserved("other tensors than torch's are asked for")
    return options


class Rows:
    """A tensor [count, ...] that windows fill in whichever order; those of a GPU are waited for only when the next
    window is on its way to the host."""

    def __init__(self, count: int, device: torch.device):
        self._count, self._device = count, device
        self._rows: Tensor | None = None
        self._pending: tuple[np.ndarray, Callable[[], Tensor]] | None = None

    def put(self, rows: np.ndarray, values: Tensor) -> None:
        """Row rows[i] becomes values[i]; rows int64 [n], values [n, ...]."""
        if self._rows is None:
            self._rows = torch.empty(self._count, *values.shape[1:], dtype=values.dtype, device=self._device)
        if values.device == self._device:
            self._rows.index_copy_(0, torch.from_numpy(rows).to(self._device, non_blocking=True), values)
            return
        arriving = to_host(values)
        self._collect()
        self._pending = rows, arriving

    def _collect(self) -> None:
        if self._pending is not None:
            rows, arriving = self._pending
            self._rows.index_copy_(0, torch.from_numpy(rows), arriving())
            self._pending = None

    def filled(self) -> Tensor:
        self._collect()
        return self._rows


def to_host(values: Tensor) -> Callable[[], Tensor]:
    """Have values copied to the host, into pinned memory, which torch reuses; what this returns waits for them."""
    if values.device.type == "cpu":
        return lambda: values
    # Whatever torch's default device is.
    on_host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
    done = torch.cuda.Event()
    on_host.copy_(values, non_blocking=True)
    done.record(torch.cuda.current_stream(values.device))

    def arrived() -> Tensor:
        done.synchronize()
        return on_host

    return arrived
