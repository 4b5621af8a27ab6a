"""The activations of a GEMM's epilogue and their backward, in float32, by their names in `fastbert.ops`."""

import triton
import triton.language as tl

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "tanh")


@triton.jit
def _normal_tail(a):
    """P(Z > a) of the standard normal for a >= 0: relative error 6.2e-6 for a <= 5.5, absolute error 1e-12 above.

    The base-2 logarithm of the tail is smooth, so a polynomial of degree 7 (our own minimax fit on [0, 5.5]) and one
    exp2 replace erf: 11 instructions an element for GELU instead of 32 on sm_90, with 1/300 of bfloat16's rounding
    error. The leading coefficient is negative, so the tail goes to zero above 5.5.
    """
    power = -1.7934536e-06 * a + 6.09041413e-05
    power = power * a - 0.000926028767
    power = power * a + 0.00849375622
    power = power * a - 0.0539378435
    power = power * a - 0.458480511
    power = power * a - 1.15124683
    power = power * a - 0.999995465
    return tl.exp2(power)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """activation(x). EXACT uses erf itself, for float32 outputs. NaN stays NaN in every activation."""
    if ACTIVATION == "gelu":
        if EXACT:
            x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
        else:
            tail = _normal_tail(tl.abs(x))
            x = x * tl.where(x > 0, 1.0 - tail, tail)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 x (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3). The factors include 2 log2(e).
        exponent = x * (2.302208198144325 + 0.1029432395800235 * x * x)
        x = x / (1.0 + tl.exp2(-exponent))
    elif ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "tanh":
        decay = tl.exp2(tl.abs(x) * -2.8853900817779268)  # exp(-2 |x|)
        size = (1.0 - decay) / (1.0 + decay)
        # 1 - exp(-2 |x|) cancels for small x. Up to 0.1 the Taylor series is used, with an error of 2e-11.
        square = x * x
        series = x * (
            1.0 + square * (-0.3333333333333333 + square * (0.13333333333333333 - square * 0.05396825396825397))
        )
        x = tl.where(square < 0.01, series, tl.where(x < 0, -size, size))
    return x


@triton.jit
def activate_backward(grad, x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """grad * activation'(x) in float32, as PyTorch has it: ReLU passes grad where x > 0 or x is NaN.

    EXACT: as in `activate`. NaN in x gives NaN, except for ReLU and "none".
    """
    if ACTIVATION == "gelu":
        # Phi(x) + x phi(x)
        if EXACT:
            below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        else:
            tail = _normal_tail(tl.abs(x))
            below = tl.where(x > 0, 1.0 - tail, tail)
        density = 0.3989422804014327 * tl.exp2(x * x * -0.7213475204444817)
        grad *= below + x * density
    elif ACTIVATION == "gelu_tanh":
        # With u of `activate`, s = sigmoid(2u): s + x s (1 - s) (2u)'. exp(-2 |u|) neither overflows nor cancels.
        square = x * x
        decay = tl.exp2(-tl.abs(x) * (2.302208198144325 + 0.1029432395800235 * square))
        inverse = 1.0 / (1.0 + decay)
        slope = decay * inverse * inverse * (1.5957691216057308 + 0.21406444881780076 * square)
        # Where decay is zero, the square may be infinite.
        grad *= tl.where(x > 0, inverse, decay * inverse) + tl.where(decay == 0, 0.0, x * slope)
    elif ACTIVATION == "relu":
        grad = tl.where(x <= 0, 0.0, grad)
    elif ACTIVATION == "tanh":
        # 1 - tanh(x)^2 = 4 d / (1 + d)^2, d = exp(-2 |x|), without the cancellation.
        decay = tl.exp2(tl.abs(x) * -2.8853900817779268)
        inverse = 1.0 / (1.0 + decay)
        grad *= 4.0 * decay * inverse * inverse
    return grad
