"""The quickened interpreter gives the results of Triton's own, and its patches can be taken back."""

import pytest
import torch
from cases import DTYPES
from kernel_cases import OPS, example
from quick_interpreter import not_quickened
from torch import Tensor
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_results_are_those_of_tritons_own_interpreter(op, dtype):
    launcher, arguments = example(op, dtype)
    quick = launcher(**arguments)
    with not_quickened():
        assert interpreter._patch_lang.__module__ == interpreter.__name__
        own = launcher(**arguments)
    assert interpreter._patch_lang.__module__ == "quick_interpreter"
    for found, expected in zip(*([x] if isinstance(x, Tensor) else x for x in (quick, own)), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
