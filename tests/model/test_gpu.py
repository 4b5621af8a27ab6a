"""Tests that need a CUDA device. Every call runs in the kernels, or raises.

test_triton.py and the tests of the kernels also run on the device; ids out of range are tested there.
"""

import os
import subprocess
import sys
from copy import deepcopy
from importlib import import_module
from itertools import product
from pkgutil import iter_modules

import pytest
import torch
import triton
from cases import DTYPES, HEADS, MASKS, VOCAB, at_kept_tokens, batch, inputs_for, pair
from kernel_cases import DEVICE

import fastbert
import fastbert_kernels
from fastbert import ops
from fastbert.commands.texts import docstrings
from fastbert.testing import check_close

pytestmark = pytest.mark.gpu

SIZES = {
    name: {
        "hidden_size": hidden_size, "num_attention_heads": heads, "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": 2, "max_position_embeddings": 512, "initializer_range": 0.02,
    }
    for name, hidden_size, heads in (("minilm", 384, 12), ("base", 768, 12), ("large", 1024, 16))
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_kernels():
    fastbert_kernels.take_bad_ids(DEVICE)
    with fastbert.backend("triton"):
        yield


def to_device(inputs):
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def trio(head="BertModel", dtype=torch.float32, **settings):
    """Ours and transformers' in this dtype, and the truth: the same weights in float64."""
    ours, theirs = (model.to(DEVICE, dtype) for model in pair(head, **settings))
    return ours, theirs, deepcopy(theirs).double()


def ragged(batch_size, seq_len):
    """input_ids and attention_mask [B, S]: the first sequence fills its row, the last one has one token."""
    lengths = torch.linspace(seq_len, 1, batch_size).round()
    mask = torch.arange(seq_len) < lengths[:, None]
    return to_device({"input_ids": torch.randint(0, VOCAB, mask.shape), "attention_mask": mask.long()})


def check_outputs(ours, theirs, truth, mask):
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name == "pooler_output" and mask is not None and not mask[:, 0].all():
            continue  # transformers pools the padding
        check_close(name, *(at_kept_tokens(x[name], mask) for x in (ours, theirs, truth)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [None, *MASKS])
def test_outputs(mask, dtype, launches):
    """Packing on the host and on the device gives bitwise equal outputs."""
    inputs, models = to_device(batch(mask)), trio(dtype=dtype)
    with torch.no_grad():
        outputs = [model(**inputs) for model in models]
        assert launches.count("_packing_plan_kernel") == (mask is not None)
        on_host = models[0](**inputs | ({} if mask is None else {"attention_mask": MASKS[mask]}))
        assert launches.count("_packing_plan_kernel") == (mask is not None)
    check_outputs(*outputs, inputs.get("attention_mask"))
    assert all(torch.equal(on_host[name], outputs[0][name]) for name in on_host)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_heads(head, dtype):
    inputs = to_device(inputs_for(head, "right"))
    with torch.no_grad():
        outputs = [model(**inputs) for model in trio(head, dtype)]
    check_outputs(*outputs, inputs["attention_mask"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", ["right", "left", "holes"])
def test_minilm(padding, dtype, minilm, transformers_minilm, tokenizer):
    ours, theirs = (deepcopy(model).to(DEVICE, dtype) for model in (minilm, transformers_minilm))
    truth = deepcopy(theirs).double()
    for num_texts in (4, 24):
        inputs = tokenizer(
            docstrings(num_texts), padding="max_length", padding_side="left" if padding == "left" else "right",
            truncation=True, max_length=128, return_tensors="pt",
        ).to(DEVICE)  # fmt: skip
        if padding == "holes":
            inputs["attention_mask"][:, 3:9:2] = 0
        with torch.no_grad():
            outputs = [model(**inputs) for model in (ours, theirs, truth)]
        check_outputs(*outputs, inputs["attention_mask"])
        assert not outputs[0].last_hidden_state[inputs["attention_mask"] == 0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("size", ["base", "large"])
def test_sequences_of_512_tokens(size, batch_size, dtype):
    """Fewer and more than 1024 tokens, which have different launch configurations."""
    inputs = ragged(batch_size, 512)
    with torch.no_grad():
        outputs = [model(**inputs) for model in trio(dtype=dtype, **SIZES[size])]
    check_outputs(*outputs, inputs["attention_mask"])


def encoded(model, texts, seq_len, shift=0.0, mask_on=DEVICE):
    """Hidden states, pooler output and mean of each text; shift: the share of padding on the left."""
    ids, positions, mask = torch.zeros(3, len(texts), seq_len, dtype=torch.long)
    places = []
    for row, text in enumerate(texts):
        start = int((seq_len - len(text)) * shift)
        places.append(slice(start, start + len(text)))
        ids[row, places[-1]], positions[row, places[-1]], mask[row, places[-1]] = text, torch.arange(len(text)), 1
    outputs = model(ids.to(DEVICE), mask.to(mask_on), position_ids=positions.to(DEVICE))
    indices, cu_seqlens = ops.packing_plan(mask.to(DEVICE))
    means = ops.pool(outputs.last_hidden_state.flatten(0, 1), cu_seqlens, "mean", indices=indices)
    rows = zip(places, outputs.last_hidden_state, outputs.pooler_output, means, strict=True)
    return [torch.cat((hidden[place], first[None], mean[None])) for place, hidden, first, mean in rows]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_a_sequence_is_bitwise_equal_in_every_batch(size, dtype):
    """In any order, at any place in its row, below and above 1024 tokens and sequences, with the mask on any device."""
    ours = pair(**SIZES[size])[0].to(DEVICE, dtype)
    texts = [torch.randint(0, VOCAB, (length,)) for length in (128, 1, 37, 64, 100, 9)]
    batches = [((0, 1, 2, 3, 4, 5), 128, 0.0)] * 5
    batches += ((5, 3, 1, 0, 2, 4), 160, 1.0), ((4, 0, 2) * 6, 131, 0.5), ((1, 5) * 530, 12, 1.0)
    with torch.no_grad():
        alone = [encoded(ours, [text], len(text))[0] for text in texts]
        for text, expected in zip(texts, alone, strict=True):
            unmasked = ours(text[None].to(DEVICE))
            assert torch.equal(torch.cat((unmasked.last_hidden_state[0], unmasked.pooler_output)), expected[:-1])
        for (numbers, *layout), mask_on in product(batches, (DEVICE, "cpu")):
            outputs = encoded(ours, [texts[number] for number in numbers], *layout, mask_on)
            assert all(torch.equal(out, alone[number]) for number, out in zip(numbers, outputs, strict=True)), layout


@pytest.mark.parametrize("mask_on", ["cpu", DEVICE], ids=["host", "device"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head", HEADS)
def test_a_forward_does_not_wait_for_the_device(head, mask, mask_on):
    ours = pair(head)[0].to(DEVICE)
    inputs = to_device(inputs_for(head, mask))
    inputs["attention_mask"] = inputs["attention_mask"].to(mask_on)
    with torch.no_grad():
        expected = ours(**inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            outputs = ours(**inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(outputs[name], expected[name]) for name in expected)


def test_half_a_batch_takes_less_memory_when_the_host_knows_the_mask():
    ours, input_ids, peaks = pair(**SIZES["base"])[0].to(DEVICE), torch.zeros(16, 512, dtype=torch.int64).to(DEVICE), []
    for length in (512, 256):
        mask = torch.ones(16, 512).index_fill(1, torch.arange(length, 512), 0)
        with torch.no_grad():
            ours(input_ids, mask)
            torch.cuda.reset_peak_memory_stats()
            ours(input_ids, mask)
        peaks.append(torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated())
    assert peaks[1] < 0.75 * peaks[0]


@pytest.mark.skipif(torch.version.hip is not None, reason="AMD's matrix instructions take float32 itself")
def test_float32_is_one_tf32_product_only_where_torch_allows_it():
    ours, theirs, truth = trio(**SIZES["base"])
    inputs, matmul = ragged(4, 128), torch.backends.cuda.matmul
    with torch.no_grad():
        default, expected, exact = (model(**inputs) for model in (ours, theirs, truth))
        kept, matmul.fp32_precision = matmul.fp32_precision, "tf32"
        try:
            plain = ours(**inputs)
        finally:
            matmul.fp32_precision = kept
        again = ours(**inputs)
    check_outputs(default, expected, exact, inputs["attention_mask"])
    tokens = inputs["attention_mask"] == 1
    errors = [(out[0] - exact[0])[tokens].abs().max() for out in (default, plain)]
    assert errors[1] > 4 * errors[0]
    assert torch.equal(again.last_hidden_state, default.last_hidden_state)


def run_fresh(code, **environment):
    """The lines that code prints in a new process, which defines a tiny model, ids and a mask."""
    setup = f"""
import torch, fastbert
sizes = {{"vocab_size": 61, "hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 80}}
model = fastbert.BertModel(fastbert.BertConfig(num_hidden_layers=2, **sizes)).eval().to("{DEVICE}")
ids, mask = torch.randint(0, 61, (4, 12)), torch.arange(12) < torch.tensor([12, 7, 1, 4])[:, None]
ids, mask = ids.to("{DEVICE}"), mask.to("{DEVICE}")
"""
    environment = os.environ | {"FASTBERT_BACKEND": "triton"} | environment
    run = subprocess.run([sys.executable, "-c", setup + code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_the_first_launch_comes_from_eight_threads_at_once(tmp_path):
    code = """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
start = Barrier(8)
@torch.no_grad()
def first(_):
    start.wait()
    return model(ids, mask).last_hidden_state
with ThreadPoolExecutor(8) as pool:
    outputs = list(pool.map(first, range(8)))
with torch.no_grad():
    expected = model(ids, mask).last_hidden_state
print(expected.isfinite().all().item(), sum(torch.equal(x, expected) for x in outputs))
"""
    assert run_fresh(code, TRITON_CACHE_DIR=str(tmp_path)) == ["True 8"]


def test_a_side_stream():
    """The inputs are copied late on the side stream: a launch on another stream would read zeros."""
    ours = pair()[0].to(DEVICE)
    inputs = to_device(batch("right"))
    buffers = {name: torch.zeros_like(value) for name, value in inputs.items()}
    stream = torch.cuda.Stream()
    with torch.no_grad():
        expected = ours(**inputs).last_hidden_state
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            for name, value in inputs.items():
                buffers[name].copy_(value)
            outputs = ours(**buffers).last_hidden_state.clone()
    stream.synchronize()
    assert torch.equal(outputs, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_direct_launches_are_bitwise_equal_to_tritons(dtype):
    """Alternating shapes, each at different addresses. A launch hook forces launches through Triton's launcher."""
    model, _ = pair(**SIZES["base"])
    model = model.to(DEVICE, dtype)
    batches = [ragged(*shape) for shape in ((1, 16), (3, 40), (8, 128), (1, 17), (3, 40), (2, 512))] * 3
    watched, hooks = [], triton.knobs.runtime.launch_enter_hook

    def watch(metadata):
        watched.append(metadata)

    with torch.no_grad():
        hooks.add(watch)
        try:
            expected = [model(**inputs) for inputs in batches]
        finally:
            hooks.remove(watch)
        assert watched
        watched.clear()
        kept = []  # keeps memory in use, so that addresses differ
        for _ in range(2):
            for inputs, outputs in zip(batches, expected, strict=True):
                kept.append(model(**inputs))
                assert torch.equal(kept[-1].last_hidden_state, outputs.last_hidden_state)
                assert torch.equal(kept[-1].pooler_output, outputs.pooler_output)
        assert not watched


def test_a_soak_of_graphs_that_are_captured_beside_other_threads():
    """10,000 calls of random sizes from eight threads: bitwise equal, constant memory, and graphs were replayed."""
    code = """
import random
from concurrent.futures import ThreadPoolExecutor
from fastbert import automatic
sizes = [(random.Random(seed).randint(1, 8), random.Random(-seed).randint(1, 64)) for seed in range(1, 101)]
batches = [{"input_ids": torch.randint(0, 61, size, device=ids.device)} for size in sizes]
for batch in batches:
    batch["attention_mask"] = torch.randint(0, 2, batch["input_ids"].shape, device=ids.device)
with torch.no_grad(), fastbert.cuda_graphs("off"):
    expected = [model(**batch).last_hidden_state for batch in batches]
torch.cuda.synchronize()

@torch.no_grad()
def serve(calls):
    return sum(torch.equal(model(**batches[x]).last_hidden_state, expected[x]) for x in calls)

def turn(seed):
    every = [random.Random(seed).randrange(len(batches)) for _ in range(5000)]
    with ThreadPoolExecutor(8) as pool:
        right = sum(pool.map(serve, (every[thread::8] for thread in range(8))))
    torch.cuda.synchronize()
    return right, torch.cuda.memory_reserved()

right, reserved = zip(turn(1), turn(2))
print(sum(right), automatic.graphs_of(model).num_graphs > 0, reserved[1] - reserved[0] <= 2**26)
"""
    assert run_fresh(code, FASTBERT_GRAPHS="on") == ["10000 True True"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("mask", [None, "holes"])
def test_a_device_that_is_not_current(mask):
    inputs = {name: value.to("cuda:1") for name, value in batch(mask).items()}
    with torch.no_grad():
        outputs = [model.to("cuda:1")(**inputs) for model in trio()]
    assert outputs[0].last_hidden_state.device == torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    check_outputs(*outputs, inputs.get("attention_mask"))


def kernels():
    modules = [import_module(f"fastbert_kernels.{module.name}") for module in iter_modules(fastbert_kernels.__path__)]
    return {value for module in modules for value in vars(module).values() if isinstance(value, triton.JITFunction)}


def num_variants():
    return sum(len(caches[0]) for kernel in kernels() for caches in kernel.device_caches.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_that_vary_do_not_compile_again(dtype):
    """After a warm-up with one small and one large shape, shapes up to 1024 tokens and beyond compile nothing."""
    ours = pair(**SIZES["minilm"])[0].to(DEVICE, dtype)
    for kernel in kernels():
        kernel.device_caches.clear()
    fastbert.warmup(ours, [(1, 16), (16, 128)])
    expected = num_variants()
    assert expected >= 8
    shapes = (1, 1), (1, 2), (2, 7), (5, 31), (7, 128), (16, 64), (1024, 1), (5, 205), (9, 117), (3, 512), (33, 64)
    with torch.no_grad():
        for batch_size, seq_len in shapes:
            inputs = ragged(batch_size, seq_len)
            for mask in (None, inputs["attention_mask"], inputs["attention_mask"].cpu()):
                ours(inputs["input_ids"], mask)
                assert num_variants() == expected, (batch_size, seq_len)
            packed = inputs["input_ids"].int().view(1, -1)
            bounds = torch.arange(batch_size + 1, dtype=torch.int32, device=DEVICE) * seq_len
            ours(packed, cu_seq_lens_q=bounds, max_length_q=seq_len)
            assert num_variants() == expected, (batch_size, seq_len)


def gradients(model, inputs, autocast):
    """The gradients of a random weighted sum of the kept tokens' states and of the pooler outputs of sequences that
    begin in column 0."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    generator = torch.Generator().manual_seed(1)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        outputs = model.train()(**inputs)
        parts = outputs.last_hidden_state[mask], outputs.pooler_output[mask[:, 0]]
        loss = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in parts)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("mask", [None, *MASKS])
def test_gradients(mask, autocast):
    """All parameters at once, each divided by the root mean square of its gradient."""
    ours, theirs, truth = trio(num_hidden_layers=2)
    inputs = to_device(batch(mask))
    found = [gradients(model, inputs, autocast and model is not truth) for model in (ours, theirs, truth)]
    # A key bias changes no softmax: its gradient is zero up to rounding.
    sizes = {name: x.square().mean().sqrt() for name, x in found[2].items() if not name.endswith("key.bias")}
    check_close("gradients", *(torch.cat([(x[name] / size).flatten() for name, size in sizes.items()]) for x in found))


@pytest.mark.parametrize("recorded", [False, True], ids=["inference", "gradients"])
def test_compile_fullgraph(recorded):
    torch._dynamo.reset()
    ours = pair(num_hidden_layers=2)[0].to(DEVICE)
    compiled = torch.compile(ours, fullgraph=True)
    for mask in (None, *MASKS):
        inputs = to_device(batch(mask))
        with torch.set_grad_enabled(recorded):
            outputs, expected = compiled(**inputs), ours(**inputs)
        torch.testing.assert_close(outputs.to_tuple(), expected.to_tuple())
        if recorded:
            sums = (x.last_hidden_state.sin().sum() + x.pooler_output.sum() for x in (outputs, expected))
            grads = [torch.autograd.grad(x, list(ours.parameters())) for x in sums]
            torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cuda_graph_replays_other_lengths(dtype):
    ours = pair(**SIZES["minilm"])[0].to(DEVICE, dtype)
    inputs, other = ragged(6, 90), ragged(6, 90)
    other["attention_mask"] = other["attention_mask"].flip(0, 1)
    other["attention_mask"][2, ::2] = 0
    with torch.no_grad():
        expected = [ours(**x) for x in (inputs, other)]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = ours(**inputs)
        for result in expected:
            graph.replay()
            assert all(torch.equal(outputs[name], result[name]) for name in result)
            for name, value in other.items():
                inputs[name].copy_(value)
