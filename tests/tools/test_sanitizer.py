"""The sanitizer finds planted bugs, and no bugs in `fastbert_kernels` with hostile ids, bounds and places.

Sizes, layouts and dtypes of the launchers are covered by the kernels' own tests, which run under the sanitizer, too.
"""

import re
from dataclasses import replace
from inspect import signature
from itertools import pairwise

import pytest
import torch
import triton
import triton.language as tl
from cases import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, LARGEST, LAYOUTS, OPS, count, embed_arguments, example, flat, guarded_outputs, normal
from sanitizer import sanitized
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

import fastbert_kernels
from fastbert_kernels import take_bad_ids

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="the sanitizer needs Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@triton.jit
def _copy_kernel(
    x_ptr, out_ptr, extra_ptr, shift_x, shift_out, stride_x, stride_out, rows, columns,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = x + extra. Correct if the shifts are zero and the other numbers are those of the tensors."""
    offs_r = tl.arange(0, BLOCK_ROWS)[:, None]
    offs_c = tl.arange(0, BLOCK_COLUMNS)[None, :]
    mask = (offs_r < rows) & (offs_c < columns)
    values = tl.load(x_ptr + shift_x + offs_r * stride_x + offs_c, mask=mask, other=0)
    if extra_ptr is not None:
        values += tl.load(extra_ptr)
    tl.store(out_ptr + shift_out + offs_r * stride_out + offs_c, values, mask=mask)


def copy(x: Tensor, out: Tensor, extra: Tensor | None = None, **wrong: int) -> None:
    """Launch a copy of x into out, both [R, C], with some numbers replaced by wrong ones."""
    numbers = {"stride_x": x.stride(0), "stride_out": out.stride(0), "rows": x.shape[0], "columns": x.shape[1]}
    numbers |= {"shift_x": 0, "shift_out": 0}
    _copy_kernel[(1,)](x_ptr=x, out_ptr=out, extra_ptr=extra, **numbers | wrong, BLOCK_ROWS=4, BLOCK_COLUMNS=16)


@triton.jit
def _pick_kernel(x_ptr, y_ptr, out_ptr, limit, BLOCK: tl.constexpr):
    """out is x before the limit and y from it on, loaded by one block of pointers to both."""
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(tl.where(offs < limit, x_ptr + offs, y_ptr + offs)))


@triton.jit
def _descriptor_kernel(x, out, row):
    out.store([row, 0], x.load([row, 0]))


@triton.jit
def _atomic_kernel(total_ptr, lock_ptr, shift_total, shift_lock, BLOCK: tl.constexpr):
    tl.atomic_cas(lock_ptr + shift_lock, 0, 1)
    offs = tl.arange(0, BLOCK)
    tl.atomic_add(total_ptr + offs + shift_total, 1.0, mask=offs < 3)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "columns", "unaligned", "expanded"])
def test_a_correct_kernel_passes(layout, dtype):
    """Lanes that are masked off may point anywhere."""
    x, out = LAYOUTS[layout](torch.ones(3, 10).to(dtype)), torch.zeros(3, 10, dtype=dtype)
    with sanitized() as sanitizer:
        copy(x, out)
        assert torch.equal(out, x)
        copy(x, out, shift_x=2**40, shift_out=-(2**40), rows=0)
    assert sanitizer.stores == {("_copy_kernel", "out_ptr")}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shift_x": -1}, "load outside x_ptr: element -1 of torch.float32 [3, 10] with strides [40, 1]"),
        ({"shift_x": 1}, "load outside x_ptr: element 10 of"),
        ({"shift_x": 2**40}, f"load outside x_ptr: element {2**40} of"),
        ({"shift_x": -(2**50)}, f"load outside x_ptr: element {-(2**50)} of"),
        ({"columns": 11}, "load outside x_ptr: element 10 of"),
        ({"columns": 16}, "load outside x_ptr: element 10 of"),
        ({"rows": 4}, "load outside x_ptr: element 120 of"),
        ({"stride_x": 39}, "load outside x_ptr: element 39 of"),
        ({"extra": torch.ones(0)}, "load outside extra_ptr: element 0 of torch.float32 [0] with strides [1]"),
        ({"shift_out": -1}, "store outside out_ptr: element -1 of torch.float32 [3, 10] with strides [10, 1]"),
        ({"shift_out": 1}, "store outside out_ptr: element 30 of"),
        ({"stride_out": 11}, "store outside out_ptr: element 30 of"),
    ],
    ids=str,
)
def test_an_access_outside_a_tensor(wrong, message):
    """Before its start, past its end or between two rows, by a wrong offset, mask or stride.

    All these addresses are valid memory: both tensors are parts of one buffer.
    """
    buffer = torch.arange(400.0).view(10, 40)
    x, out, kept = buffer[1:4, :10], buffer[6:8].view(-1)[20:50].view(3, 10), buffer.clone()
    with sanitized(), pytest.raises(InterpreterError) as raised:
        copy(x, out, **wrong)
    reason = str(raised.value.__cause__)
    assert reason.startswith(f"_copy_kernel: {message}")
    line = "tl.store(out_ptr" if "out_ptr" in message else "values +=" if "extra" in message else "values = tl.load"
    assert re.search(rf", in test_sanitizer.py:\d+: {re.escape(line)}", reason)
    assert torch.equal(buffer, kept)


def test_an_access_of_another_argument():
    """x and out are columns of one buffer, so a row of x is followed by a row of out."""
    both = torch.zeros(3, 20)
    with sanitized(), pytest.raises(InterpreterError, match="load outside x_ptr: element 10 of"):
        copy(both[:, :10], both[:, 10:], columns=16)


@pytest.mark.parametrize(("limit", "outside"), [(0, None), (7, None), (9, "x_ptr: element 8"), (-1, None)])
def test_a_block_of_pointers_to_two_tensors(limit, outside):
    x, y, out = torch.zeros(8), torch.ones(16), torch.zeros(16)
    with sanitized():
        if outside:
            with pytest.raises(InterpreterError, match=f"_pick_kernel: load outside {outside} of"):
                _pick_kernel[(1,)](x, y, out, limit, BLOCK=16)
        else:
            _pick_kernel[(1,)](x, y, out, limit, BLOCK=16)
            assert out.sum() == 16 - max(limit, 0)


def test_descriptors():
    """Descriptors mask by their own shape, which the host may set wrongly."""
    x, out = torch.ones(11, 48)[:, :40], torch.zeros(11, 64)
    whole = [TensorDescriptor.from_tensor(tensor, [8, 64]) for tensor in (x, out)]
    with sanitized():
        _descriptor_kernel[(1,)](*whole, 8)
        assert out.sum() == 3 * 40
        for descriptor, message in (
            (replace(whole[0], shape=[11, 48]), "load outside x: element 424 of"),
            (replace(whole[0], shape=[12, 40]), "load outside x: element 528 of"),
        ):
            with pytest.raises(InterpreterError, match=f"_descriptor_kernel: {message}"):
                _descriptor_kernel[(1,)](descriptor, whole[1], 8)
        with pytest.raises(InterpreterError, match="_descriptor_kernel: store outside out: element 704 of"):
            _descriptor_kernel[(1,)](whole[0], replace(whole[1], shape=[12, 64]), 8)


def test_atomics():
    total, lock = torch.zeros(3), torch.zeros(1, dtype=torch.int32)
    with sanitized() as sanitizer:
        _atomic_kernel[(2,)](total, lock, 0, 0, BLOCK=4)
        assert total.tolist() == [2, 2, 2]
        assert lock.tolist() == [1]
        assert sanitizer.stores == {("_atomic_kernel", "total_ptr"), ("_atomic_kernel", "lock_ptr")}
        for shifts, name, element in (((1, 0), "total_ptr", 3), ((0, -1), "lock_ptr", -1)):
            with pytest.raises(InterpreterError, match=f"atomic outside {name}: element {element} of"):
                _atomic_kernel[(1,)](total, lock, *shifts, BLOCK=4)


def test_kernels_write_their_outputs_only():
    written = {
        "_linear_kernel": ["out", "pre"],
        "_activation_backward_kernel": ["grad_pre_ptr", "out_ptr", "partial_ptr"],
        "_residual_layer_norm_kernel": ["out_ptr", "sum_ptr", "norm_ptr"],
        "_layer_norm_kernel": ["out_ptr"],
        "_layer_norm_backward_kernel": ["grad_x_ptr", "sums_ptr"],
        "_linear_residual_layer_norm_kernel": ["out_ptr"],
        "_qkv_projection_kernel": ["out"],
        "_attention_fwd_kernel": ["out_ptr", "lse_ptr"],
        "_attention_bwd_dq_kernel": ["delta_ptr", "grad_qkv_ptr"],
        "_attention_bwd_dkv_kernel": ["grad_qkv_ptr"],
        "_embed_layer_norm_kernel": ["out_ptr", "bad_ids_ptr"],
        "_row_lengths_kernel": ["lengths_ptr"],
        "_packing_plan_kernel": ["indices_ptr", "cu_seqlens_ptr"],
        "_unpack_kernel": ["out_ptr"],
        "_pool_kernel": ["out_ptr"],
    }
    with sanitized() as sanitizer:
        for op in OPS:
            launcher, arguments = example(op, torch.float16)
            if op == "embed_layer_norm":
                arguments["input_ids"][1, 2] = -1
            launcher(**arguments)
    assert [bad.value for bad in take_bad_ids(DEVICE)] == [-1]
    assert sanitizer.stores == {(kernel, name) for kernel, names in written.items() for name in names}


def hostile(shape: tuple[int, ...], limit: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return indices of which a third is out of range, the others below the limit."""
    wild = [-1, limit, LARGEST, -LARGEST - 1, 2**40, -(2**40), 2**63 - 1, -(2**63)]
    wild = torch.tensor(wild[:4] if dtype == torch.int32 else wild).to(dtype)
    indices = torch.randint(limit, shape).to(dtype)
    return indices.where(torch.rand(shape) < 0.67, wild[torch.randint(len(wild), shape)])


random_cases = settings(max_examples=30, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32)
counts = st.one_of(st.integers(-2, 30), st.sampled_from((LARGEST, -LARGEST - 1)))
hostile_bounds = st.lists(
    st.one_of(st.integers(-3, 12), st.sampled_from((LARGEST, -LARGEST - 1))), min_size=2, max_size=6
)


@random_cases
@given(
    seed=seeds,
    kinds=st.tuples(st.sampled_from(("int64", "int32", "embeds")), *[st.sampled_from(("int64", "int32", None))] * 2),
    layout=st.sampled_from(list(LAYOUTS)),
    width=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    size=st.integers(1, 27),
    num_tokens=counts,
)
def test_hostile_ids(seed, kinds, layout, width, dtype, size, num_tokens):
    """Exactly the tokens whose id, type, position or place is out of range are NaN."""
    torch.manual_seed(seed)
    arguments = embed_arguments(*kinds, layout, width, dtype)
    bad = torch.zeros(3, 9, dtype=torch.bool)
    for name, limit in (("input_ids", 11), ("token_type_ids", 2), ("position_ids", 9)):
        if arguments[name] is not None:
            arguments[name] = LAYOUTS[layout](hostile((3, 9), limit, arguments[name].dtype))
            bad |= (arguments[name] < 0) | (arguments[name] >= limit)
    places, live = hostile((size,), 27), min(max(num_tokens, 0), size)
    with sanitized():
        out = fastbert_kernels.embed_layer_norm(**arguments, indices=places, num_tokens=count(num_tokens))
    known = (places[:live] >= 0) & (places[:live] < 27)
    bad = bad.flatten()[places[:live].where(known, 0)] & known
    assert torch.equal(out[:live].isnan(), (bad | ~known)[:, None].expand(live, width))
    assert bool(take_bad_ids(DEVICE)) == bool(bad.any())


@random_cases
@given(
    seed=seeds,
    cu_seqlens=hostile_bounds,
    heads=st.tuples(st.integers(1, 3), st.integers(1, 128)),
    dtype=st.sampled_from(DTYPES),
    max_seqlen=st.integers(9, 300),
)
def test_hostile_bounds_of_attention(seed, cu_seqlens, heads, dtype, max_seqlen):
    """Exactly the rows between two bounds are written. Those from the last one on have a gradient, too: zero."""
    torch.manual_seed(seed)
    qkv = LAYOUTS["columns"](normal(9, 3, *heads, dtype=dtype))
    written = torch.zeros(9, dtype=torch.bool)
    for start, stop in pairwise(cu_seqlens):
        written[max(start, 0) : max(stop, 0)] = True
    cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    with sanitized(), guarded_outputs():
        out, lse = fastbert_kernels.attention_forward(qkv, cu_seqlens, max_seqlen, 0.25)
        grad = normal(*out.shape, dtype=dtype)
        grad_qkv = fastbert_kernels.attention_backward(grad, qkv, out, lse, cu_seqlens, max_seqlen, 0.25)
    assert torch.equal(out.isfinite(), written[:, None].expand(out.shape))
    assert torch.equal(lse.isfinite(), written.expand(lse.shape))
    written[max(cu_seqlens[-1].item(), 0) :] = True
    assert torch.equal(grad_qkv.isfinite().flatten(1).all(1), written)
    assert torch.equal(grad_qkv.isfinite().flatten(1).any(1), written)


@random_cases
@given(
    seed=seeds,
    cu_seqlens=hostile_bounds,
    width=st.integers(1, 300),
    mode=st.sampled_from(("first", "mean")),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_hostile_bounds_and_places_of_pool(seed, cu_seqlens, width, mode, dtype, layout):
    """Rows that do not exist count as zeros."""
    torch.manual_seed(seed)
    hidden, indices = LAYOUTS[layout](normal(7, width, dtype=dtype)), hostile((9,), 7)
    existing = indices.where((indices >= 0) & (indices < 7), 7)
    cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    with sanitized():
        out = fastbert_kernels.pool(hidden, cu_seqlens, mode, True, indices)
        with_zeros = torch.cat((hidden, torch.zeros_like(hidden[:1])))
        assert torch.equal(out, fastbert_kernels.pool(with_zeros, cu_seqlens, mode, True, existing))


@random_cases
@given(
    seed=seeds,
    size=st.integers(1, 27),
    trailing=st.lists(st.integers(1, 40), max_size=2),
    dtype=st.sampled_from(DTYPES),
    num_tokens=counts,
)
def test_hostile_places_of_unpack(seed, size, trailing, dtype, num_tokens):
    """Rows go to their places if these exist, rows past the count give zeros."""
    torch.manual_seed(seed)
    hidden, indices = normal(size, *trailing, dtype=dtype), hostile((size,), 27)
    known = (indices >= 0) & (indices < 27)
    indices = torch.randperm(27)[:size].where(known, indices)
    with sanitized():
        out = fastbert_kernels.unpack(hidden, indices, 3, 9, count(num_tokens)).flatten(0, 1)
    hidden[max(num_tokens, 0) :] = 0
    assert torch.equal(out[indices[known]], hidden[known])


# Zero past the count; the others leave these rows undefined.
CLEARED = ("unpack", "residual_layer_norm", "layer_norm_backward")
COUNTED = [op for op in OPS if "num_tokens" in signature(example(op, torch.float32)[0]).parameters]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", COUNTED)
def test_hostile_counts(op, dtype):
    """A negative count means no tokens, a count above the buffer's size means all of them."""
    launcher, arguments = example(op, dtype)
    with sanitized(), guarded_outputs():
        expected = launcher(**arguments)
        assert torch.equal(flat(launcher(**arguments, num_tokens=count(LARGEST))), flat(expected))
        for num_tokens in (-1, -LARGEST - 1):
            found = launcher(**arguments, num_tokens=count(num_tokens))
            for out in found if isinstance(found, tuple) else [found]:
                if op in CLEARED and out.shape != (2, 48):  # residual_layer_norm returns its parameters, too
                    assert not out.any()
                elif op not in CLEARED:
                    assert out.isnan().all()
