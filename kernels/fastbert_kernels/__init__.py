"""Fused Triton kernels for BERT encoders, usable without the model: ``from fastbert_kernels import attention``.

The functions are launchers, which take and return tensors of one CUDA device. `kernels/README.md` has the maths, the
shapes and the limits. If TRITON_INTERPRET=1 is set before Triton is first imported, they run on CPU tensors, slowly.
"""

from fastbert_kernels.activation_backward import activation_backward
from fastbert_kernels.attention import attention, attention_forward
from fastbert_kernels.attention_backward import attention_backward
from fastbert_kernels.dropout import Dropout
from fastbert_kernels.embed_layer_norm import BadId, embed_layer_norm, take_bad_ids
from fastbert_kernels.encoder_layer import LayerWeights, encoder_layer
from fastbert_kernels.encoder_layer_training import (
    Dropouts,
    LayerGradients,
    SavedTensors,
    encoder_layer_backward,
    encoder_layer_forward,
    wanted_gradients,
)
from fastbert_kernels.layer_norm import layer_norm
from fastbert_kernels.layer_norm_backward import layer_norm_backward
from fastbert_kernels.limits import MAX_HEAD_SIZE, MAX_ROW, MAX_TRAINED_ROW
from fastbert_kernels.linear_activation import linear_activation, linear_activation_forward
from fastbert_kernels.linear_residual_layer_norm import linear_residual_layer_norm
from fastbert_kernels.matmul import INTERPRETED
from fastbert_kernels.packing import packing_plan, unpack
from fastbert_kernels.pool import pool
from fastbert_kernels.qkv_projection import qkv_projection
from fastbert_kernels.residual_layer_norm import residual_layer_norm

__all__ = [
    "INTERPRETED",
    "MAX_HEAD_SIZE",
    "MAX_ROW",
    "MAX_TRAINED_ROW",
    "BadId",
    "Dropout",
    "Dropouts",
    "LayerGradients",
    "LayerWeights",
    "SavedTensors",
    "activation_backward",
    "attention",
    "attention_backward",
    "attention_forward",
    "embed_layer_norm",
    "encoder_layer",
    "encoder_layer_backward",
    "encoder_layer_forward",
    "layer_norm",
    "layer_norm_backward",
    "linear_activation",
    "linear_activation_forward",
    "linear_residual_layer_norm",
    "packing_plan",
    "pool",
    "qkv_projection",
    "residual_layer_norm",
    "take_bad_ids",
    "unpack",
    "wanted_gradients",
]
