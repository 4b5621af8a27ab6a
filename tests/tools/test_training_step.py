"""The prediction of a training step: its page is what the code says, its work is what a layer does."""

from collections import Counter

import pytest
import torch
import training_step
import transformers
from cases import pair
from torch.utils.flop_counter import FlopCounterMode

import fastbert
from fastbert_kernels.launch import launching_by
from fastbert_kernels.tuning.roofline import MODELS, Model, parameters, training_layer
from fastbert_kernels.tuning.roofline import training_step as parts_of_step


def test_the_page_is_what_the_code_writes():
    begin, end = training_step.MARKS
    written = training_step.PAGE.read_text().partition(begin)[2].partition(end)[0]
    assert written.strip() == "\n\n".join(training_step.text()), "run `make report` and look at its diff"


def test_what_the_page_says_of_its_figures():
    for lengths in (training_step.FULL, training_step.HALF_FULL):
        predicted = training_step.step(lengths, True)
        assert predicted.host > predicted.device > predicted.roofline
        assert predicted.time == predicted.host
    assert (len(training_step.HALF_FULL), min(training_step.HALF_FULL), max(training_step.HALF_FULL)) == (32, 2, 125)
    assert all(each.is_reached for each in training_step.goals())


def test_the_number_of_parameters():
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(transformers.BertConfig())
    assert parameters(MODELS["base"]) == sum(p.numel() for p in model.parameters())
    assert parts_of_step(MODELS["base"], [128], True)[-1].work.bytes == 28 * parameters(MODELS["base"])


def test_floating_point_operations_equal_torchs_count():
    """Beside those that attention does again: scores twice, and once the product of the gradient with the values."""
    width, batch_size, seq_len = 48, 3, 20
    config = transformers.BertConfig(
        hidden_size=width, num_hidden_layers=1, num_attention_heads=3, intermediate_size=80, vocab_size=9,
        attn_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        encoder = transformers.BertModel(config).encoder
        x = torch.zeros(batch_size, seq_len, width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        encoder(x).last_hidden_state.sum().backward()
    again = 3 * 2 * batch_size * seq_len**2 * width
    layer = training_layer(Model(1, width, 3, 80), [seq_len] * batch_size, False)
    assert sum(part.work.flops for part in layer) == counter.get_total_flops() + again


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels get operands on the CPU")
def test_bytes_are_those_of_the_operands():
    """A kernel's operands in the dtypes of autocast, each once. Attention's backward writes parts of one tensor in two
    launches, and LayerNorm's backward also has partial sums, whose number depends on the device."""
    width, inner, tokens = 256, 1024, 4 * 128
    moved, settings = Counter(), {"hidden_size": width, "num_attention_heads": 4, "intermediate_size": inner}
    apart = {"_attention_bwd_dq_kernel", "_attention_bwd_dkv_kernel"}

    def launch(kernel, grid, arguments):
        for name, x in arguments.items():
            x = getattr(x, "base", x)  # of a descriptor
            if isinstance(x, torch.Tensor) and name != "sums_ptr":
                moved[kernel.fn.__name__] += x.numel() * x.element_size()

    found = []
    for num_layers in (2, 3):
        model = pair(num_hidden_layers=num_layers, max_position_embeddings=128, **settings)[0].train()
        moved.clear()
        with fastbert.backend("triton"), launching_by(launch), torch.autocast("cpu", torch.bfloat16):
            model(torch.zeros(4, 128, dtype=torch.long)).last_hidden_state.float().sum().backward()
        found.append(Counter(moved))
    sums = {"_layer_norm_backward_kernel": 2 * 3 * 4 * width * tokens}
    for part in training_layer(Model(1, width, 4, inner), [128] * 4, False):
        if part.in_our_kernel and part.runs not in apart:
            expected = part.work.bytes - sums.get(part.runs, 0)
            assert found[1][part.runs] - found[0][part.runs] == pytest.approx(expected, rel=0.02), part.runs
