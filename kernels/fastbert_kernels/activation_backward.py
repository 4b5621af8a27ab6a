"""The backward of an activation between two linears, for training: grad and pre [T, F] -> three outputs.

    grad_pre = grad * activation'(pre)  [T, F]
    output = activation(pre)            [T, F], for the weight gradient of the next linear
    grad_bias = sum over T of grad_pre  [F], float32

pre is the kept x W^T + b. output is made again from it, so that it need not be kept, too: it differs from the
forward's by the rounding of pre. One elementwise launch reads both operands once.
Derivatives, and the values that are summed, are float32. There are no atomics: each program adds its rows in order to a
partial sum, and PyTorch adds the partial sums, so that results repeat on one device. The number of partial sums depends
on the number of SMs. Derivative of GELU: Phi(x) + x phi(x) (Hendrycks and Gimpel 2016).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert_kernels.activation import ACTIVATIONS, activate, activate_backward
from fastbert_kernels.launch import CachedLaunch, cached_by_specs
from fastbert_kernels.operands import (
    TensorSpec,
    check,
    check_shape,
    common_unit,
    have_unit_strides,
    row_stride,
    shape_of,
    spec_of,
    with_unit_stride,
)
from fastbert_kernels.target import num_sms

# As many as fit on an SM in float32, so that loads of some overlap with the arithmetic of others. Not measured.
PROGRAMS_PER_SM = 5


@triton.jit(do_not_specialize=["num_tokens"])
def _activation_backward_kernel(
    grad_ptr,  # [T, F]
    pre_ptr,  # [T, F]
    grad_pre_ptr,  # [T, F]
    out_ptr,  # [T, F]
    partial_ptr,  # float32 [P, F], a row for each program in axis 1
    stride_grad,  # in UNITs, like every stride and width
    stride_pre,
    num_tokens,
    width,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    width *= UNIT
    offs_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask_f = offs_f < width
    total = tl.zeros((BLOCK_ROWS, BLOCK_F), tl.float32)
    step = tl.num_programs(1) * BLOCK_ROWS
    for row in range(tl.program_id(1) * BLOCK_ROWS, num_tokens, step):
        offs_t = row + tl.arange(0, BLOCK_ROWS)
        mask = (offs_t < num_tokens)[:, None] & mask_f[None, :]
        offs_t = offs_t.to(tl.int64)[:, None]
        grad = tl.load(grad_ptr + offs_t * (stride_grad * UNIT) + offs_f[None, :], mask=mask, other=0.0)
        pre = tl.load(pre_ptr + offs_t * (stride_pre * UNIT) + offs_f[None, :], mask=mask, other=0.0).to(tl.float32)
        grad_pre = activate_backward(grad.to(tl.float32), pre, ACTIVATION, EXACT)
        total += grad_pre
        places = offs_t * width + offs_f[None, :]
        tl.store(grad_pre_ptr + places, grad_pre.to(grad_pre_ptr.dtype.element_ty), mask=mask)
        output = activate(pre, ACTIVATION, EXACT)
        tl.store(out_ptr + places, output.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * width + offs_f, tl.sum(total, axis=0), mask=mask_f)


@cached_by_specs
def _activation_backward_launch(grad: TensorSpec, pre: TensorSpec, activation: str) -> CachedLaunch | None:
    """Prepare the launch, or return None if operands have to be copied first."""
    operation = "activation_backward"
    if activation not in ACTIVATIONS:
        raise ValueError(f"{operation}: activation {activation!r} is unknown; choose one of {ACTIVATIONS}")
    check(operation, grad, pre)
    size, width = shape_of(operation, "grad", grad, "T F")
    check_shape(operation, "pre", pre, size, width)
    if pre.dtype != grad.dtype:
        raise TypeError(f"{operation}: grad is {grad.dtype} and pre {pre.dtype}, expected one dtype")
    if not have_unit_strides(grad, pre):
        return None
    block_rows, block_f = 16, max(1, min(128, triton.next_power_of_2(width)))
    columns = triton.cdiv(width, block_f)
    stride_grad, stride_pre = row_stride(grad), row_stride(pre)
    unit = common_unit(grad, stride_grad, stride_pre, width)
    chunks = triton.cdiv(num_sms(grad.device) * PROGRAMS_PER_SM, max(columns, 1))
    return CachedLaunch(
        _activation_backward_kernel,
        (columns, min(triton.cdiv(size, block_rows), chunks)),
        grad.device,
        {
            "stride_grad": stride_grad // unit,
            "stride_pre": stride_pre // unit,
            "num_tokens": size,
            "width": width // unit,
            "ACTIVATION": activation,
            "EXACT": grad.dtype == torch.float32,
            "UNIT": unit,
            "BLOCK_ROWS": block_rows,
            "BLOCK_F": block_f,
            "num_warps": 4,
        },
    )


def activation_backward(grad: Tensor, pre: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """grad and pre [T, F] -> grad * activation'(pre) [T, F], activation(pre) [T, F], the first one's sum over T [F].

    grad: of activation(pre). The sum is float32, of values before rounding; the others have the operands' dtype.
    activation: as in `linear_activation`. Raises ValueError or TypeError for an unknown activation and invalid shapes,
    dtypes or devices.
    """
    launch = _activation_backward_launch(spec_of(grad), spec_of(pre), activation)
    if launch is None:
        return activation_backward(with_unit_stride(grad), with_unit_stride(pre), activation)
    grad_pre, output = (grad.new_empty(grad.shape) for _ in range(2))
    partial = grad.new_empty(launch.grid[1], grad.shape[1], dtype=torch.float32)
    launch(grad_ptr=grad, pre_ptr=pre, grad_pre_ptr=grad_pre, out_ptr=output, partial_ptr=partial)
    return grad_pre, output, partial.sum(0)
