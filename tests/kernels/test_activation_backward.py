"""The backward of an activation, compared with autograd of PyTorch's activation."""

import pytest
import torch
from cases import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import ACTIVATIONS, DEVICE, GUARDED, HALVES, LAYOUTS, check, normal, pairwise, random_cases

from fastbert_kernels import activation_backward, linear_activation_forward

pytestmark = GUARDED

INFINITE, NAN = float("inf"), float("nan")
EXTREMES = [0.0, -0.0, *(sign * size for size in (1e-4, 3, 6, 30, 1e4, INFINITE) for sign in (1, -1)), NAN]


@pairwise(
    activation=ACTIVATIONS,
    dtype=DTYPES,
    rows=(1, 2, 63, 64, 65, 300),
    columns=(1, 40, 128, 300, 1200),
    layout=LAYOUTS,
)
def test_activation_backward(activation, dtype, rows, columns, layout):
    grad, pre = normal(rows, columns, dtype=dtype), 2 * normal(rows, columns, dtype=dtype)
    grad_pre, output, grad_bias = check(
        "activation_backward", grad=LAYOUTS[layout](grad), pre=pre, activation=activation
    )
    assert (grad_pre.dtype, output.dtype, grad_bias.dtype) == (dtype, dtype, torch.float32)


@random_cases
@given(
    rows=st.integers(1, 200),
    columns=st.integers(1, 200),
    activation=st.sampled_from(list(ACTIVATIONS)),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(st.sampled_from(list(LAYOUTS)), st.sampled_from(list(LAYOUTS))),
    scale=st.sampled_from((1e-3, 1.0, 10.0)),
)
def test_random_activation_backward(rows, columns, activation, dtype, layouts, scale):
    torch.manual_seed(0)
    grad, pre = (LAYOUTS[layout](normal(rows, columns, dtype=dtype)) for layout in layouts)
    check("activation_backward", grad=grad, pre=pre * scale, activation=activation)


def backward_of_torch(grad, pre, activation):
    pre = pre.clone().requires_grad_()
    output = ACTIVATIONS[activation](pre)
    return torch.autograd.grad(output, pre, grad)[0], output.detach()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_inputs(activation, dtype):
    """Each value is compared alone with float64, where PyTorch's is finite in dtype. NaN gives what it gives there.

    In 16 bits PyTorch takes the derivative of tanh from the rounded output, so its own values are far off.
    """
    pre = torch.tensor(EXTREMES, device=DEVICE, dtype=dtype).repeat(3, 1)
    grad = torch.tensor([[1.0], [-3.0], [0.0]], device=DEVICE, dtype=dtype).expand(pre.shape)
    expected, truths = (backward_of_torch(grad.to(kind), pre.to(kind), activation) for kind in (dtype, torch.float64))
    found = activation_backward(grad, pre, activation)
    for theirs, truth, ours in zip(expected, truths, found[:2], strict=True):
        finite = theirs.isfinite()
        # Where values are tiny, float32's arithmetic on values of order one sets the error.
        limit = torch.finfo(dtype).eps * truth[finite].abs() + 2e-6
        assert ((ours[finite] - truth[finite]).abs() <= limit).all()
        assert torch.equal(ours[:, -1].isnan(), theirs[:, -1].isnan())
    assert torch.equal(found[2][:-3].isfinite(), found[0][:, :-3].isfinite().all(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_largest_inputs(activation, dtype):
    """Their squares are infinite. PyTorch's derivative of GELU's tanh approximation is NaN for them."""
    largest = torch.finfo(dtype).max
    pre = torch.tensor([[largest, -largest]], device=DEVICE, dtype=dtype)
    derivative = {"none": [[1.0, 1.0]], "tanh": [[0.0, 0.0]]}.get(activation, [[1.0, 0.0]])
    grad_pre, _, grad_bias = activation_backward(torch.ones_like(pre), pre, activation)
    assert grad_pre.tolist() == derivative
    assert grad_bias.tolist() == derivative[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relu_keeps_nothing_of_a_gradient_that_it_blocks(dtype):
    """As PyTorch's: infinite and NaN gradients of inputs up to zero give zero, not NaN."""
    pre = torch.tensor([[-1.0, 0.0, -0.0, -INFINITE, 1.0, NAN]], device=DEVICE, dtype=dtype)
    for value in (INFINITE, NAN, 2.0):
        grad = torch.full_like(pre, value)
        expected, _ = backward_of_torch(grad, pre, "relu")
        assert torch.equal(activation_backward(grad, pre, "relu")[0].nan_to_num(9), expected.nan_to_num(9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_size_is_a_rounding_away(activation, dtype):
    """Each value is compared alone with float64, since the tolerance rule is relative to the largest."""
    pre = torch.linspace(-12, 12, 40 * 48, device=DEVICE).view(40, 48).to(dtype)
    grad = torch.ones_like(pre)
    truths, found = (
        backward_of_torch(grad.double(), pre.double(), activation),
        activation_backward(grad, pre, activation),
    )
    for truth, ours in zip(truths, found[:2], strict=True):
        # The polynomial of the normal distribution's tail is off by 6e-6 of the tail.
        absolute = 5e-6 if dtype in HALVES else 1e-6
        assert ((ours - truth).abs() <= torch.finfo(dtype).eps * truth.abs() + absolute).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_sum_is_of_values_before_rounding(activation, dtype):
    """The rounded gradients add up to another sum, by more than the error."""
    grad, pre = 1 + torch.rand(300, 40).to(DEVICE, dtype), normal(300, 40, dtype=dtype)
    truth = backward_of_torch(grad.double(), pre.double(), activation)[0].sum(0)
    grad_pre, _, grad_bias = activation_backward(grad, pre, activation)
    error = (grad_bias - truth).abs().max() / truth.abs().max()
    assert error < 1e-5
    if activation not in ("none", "relu"):  # these round nothing
        assert (grad_pre.double().sum(0) - truth).abs().max() / truth.abs().max() > 2 * error


@pytest.mark.parametrize(("rows", "columns"), [(1, 40), (65, 300), (1000, 40)])
def test_results_repeat(rows, columns):
    grad, pre = normal(rows, columns, dtype=torch.bfloat16), normal(rows, columns, dtype=torch.bfloat16)
    first, second = (activation_backward(grad, pre, "gelu") for _ in range(2))
    for once, again in zip(first, second, strict=True):
        assert torch.equal(once, again)


def test_rows_are_summed_by_several_programs_in_several_steps():
    """A row of NaN reaches the sums, wherever it is, and no other row. Five programs share 13 blocks of rows here."""
    grad, pre = normal(203, 300), normal(203, 300)
    expected = activation_backward(grad, pre, "gelu")
    for row in (0, 15, 16, 47, 48, 100, 202):
        part = grad.clone()
        part[row] = NAN
        grad_pre, _, grad_bias = activation_backward(part, pre, "gelu")
        assert grad_bias.isnan().all()
        assert grad_pre[row].isnan().all()
        others = [other for other in range(203) if other != row]
        assert torch.equal(grad_pre[others], expected[0][others])
    ones = torch.ones_like(pre)
    assert torch.equal(activation_backward(ones, pre, "none")[2], torch.full((300,), 203.0, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(0, 40), (5, 0), (0, 0)])
def test_nothing(rows, columns, dtype, launches):
    x = normal(rows, columns, dtype=dtype)
    grad_pre, output, grad_bias = activation_backward(x, x, "gelu")
    assert grad_pre.shape == output.shape == (rows, columns)
    assert torch.equal(grad_bias, torch.zeros(columns, device=DEVICE))
    assert launches == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_output_is_the_forwards_up_to_the_rounding_of_its_input(activation, dtype):
    x, weight, bias = normal(33, 40, dtype=dtype), normal(48, 40, dtype=dtype) / 6, normal(48, dtype=dtype)
    out, pre = linear_activation_forward(x, weight, bias, activation)
    again = activation_backward(torch.ones_like(pre), pre, activation)[1]
    limit = 3 * torch.finfo(dtype).eps * pre.abs().max().item()
    assert (again - out).abs().max() <= limit
    # Bitwise that of the linear's epilogue on the rounded values.
    identity, zeros = torch.eye(48, dtype=dtype, device=DEVICE), torch.zeros(48, dtype=dtype, device=DEVICE)
    if dtype in HALVES:  # in float32 the product by TF32 parts may round
        assert torch.equal(again, linear_activation_forward(pre, identity, zeros, activation)[0])
