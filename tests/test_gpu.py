"""On a CUDA device: the same equality, and no synchronisation with the host."""

from copy import deepcopy

import pytest
import torch
from cases import DTYPES, MASKS, at_kept_tokens, batch, pair
from closeness import check_close

pytestmark = pytest.mark.gpu


def to_cuda(inputs):
    return {name: value.cuda() for name, value in inputs.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [None, *MASKS])
def test_outputs(mask, dtype):
    ours, theirs = (model.cuda() for model in pair())
    truth = deepcopy(theirs).double()
    inputs = to_cuda(batch(mask))
    kept = None if mask is None else MASKS[mask].cuda()
    with torch.no_grad():
        outputs = [model(**inputs).last_hidden_state for model in (ours.to(dtype), theirs.to(dtype), truth)]
    check_close(str(dtype), *(at_kept_tokens(x, kept) for x in outputs))


@pytest.mark.parametrize("mask", [None, *MASKS])
def test_a_forward_does_not_wait_for_the_device(mask):
    ours = pair()[0].cuda()
    inputs = to_cuda(batch(mask))
    with torch.no_grad():
        expected = ours(**inputs).last_hidden_state
        torch.cuda.set_sync_debug_mode("error")
        try:
            outputs = ours(**inputs).last_hidden_state
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(outputs, expected)


def test_a_mask_on_the_host_packs():
    ours = pair()[0].cuda()
    inputs = to_cuda(batch("holes"))
    with torch.no_grad():
        expected = ours(**inputs).last_hidden_state
        outputs = ours(**inputs | {"attention_mask": MASKS["holes"]}).last_hidden_state
    torch.testing.assert_close(outputs, expected, atol=1e-4, rtol=1e-4)
