"""The linear, the residual and LayerNorm, in one launch or two, compared with their formula."""

import torch
from cases import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    GEMM_AND_RESIDUAL,
    GUARDED,
    HALVES,
    LAYOUTS,
    check,
    linear_residual_arguments,
    pairwise,
    random_cases,
)

from fastbert_kernels import target

pytestmark = GUARDED


@pairwise(
    width=(48, 128, 200, 312, 384, 400, 768, 1024),
    dtypes=GEMM_AND_RESIDUAL,
    tokens=(1, 64, 65),
    layout=LAYOUTS,
)
def test_linear_residual_layer_norm(width, dtypes, tokens, layout, launches):
    """Under autocast the residual is float32 beside 16-bit operands."""
    arguments = linear_residual_arguments(tokens, width, *dtypes)
    arguments["residual"] = LAYOUTS[layout](arguments["residual"])
    kept = arguments["residual"].clone()
    assert check("linear_residual_layer_norm", **arguments).dtype == dtypes[1]
    assert torch.equal(arguments["residual"], kept)
    if target.architecture(DEVICE) in ("sm_80", "sm_90", "sm_100"):
        one = dtypes[0] in HALVES and width <= 384
        two = ["_linear_kernel", "_layer_norm_kernel"]
        assert launches == (["_linear_residual_layer_norm_kernel"] if one else two)


@random_cases
@given(
    tokens=st.integers(1, 140),
    width=st.integers(2, 500),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(st.sampled_from(list(LAYOUTS)), st.sampled_from(list(LAYOUTS))),
)
def test_random_linear_residual_layer_norm(tokens, width, dtype, layouts):
    torch.manual_seed(0)
    arguments = linear_residual_arguments(tokens, width, dtype, dtype)
    for name, layout in zip(("x", "residual"), layouts, strict=True):
        arguments[name] = LAYOUTS[layout](arguments[name])
    check("linear_residual_layer_norm", **arguments)
