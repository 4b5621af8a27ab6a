"""The real all-MiniLM-L6-v2 on real texts: docstrings of the standard library, of naturally ragged lengths."""

import pytest
import torch
from cases import at_kept_tokens
from memory import peak_memory_bytes

from fastbert.commands.texts import docstrings
from fastbert.testing import check_close


@pytest.fixture(scope="module")
def truth(transformers_minilm):
    from copy import deepcopy

    return deepcopy(transformers_minilm).double()


def encode(tokenizer, texts, side="right", max_length=128):
    tokenizer.padding_side = side
    return tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("start", [0, 100, 200])
def test_real_texts(start, side, minilm, transformers_minilm, truth, tokenizer):
    inputs = encode(tokenizer, docstrings(300)[start : start + 16], side)
    assert 0.1 < inputs["attention_mask"].float().mean() < 0.95
    with torch.no_grad():
        outputs, expected, exact = (model(**inputs) for model in (minilm, transformers_minilm, truth))
    mask = inputs["attention_mask"]
    names = ["last_hidden_state"] + ["pooler_output"] * (side == "right")
    for name in names:
        ours, theirs = (at_kept_tokens(x[name], mask) for x in (outputs, expected))
        assert (ours - theirs).abs().max() < 1e-5
        check_close(name, ours, theirs, at_kept_tokens(exact[name], mask))
    assert not outputs.last_hidden_state[mask == 0].any()


def test_holes(minilm, transformers_minilm, tokenizer):
    inputs = encode(tokenizer, docstrings(8))
    inputs["attention_mask"][:, 3:9:2] = 0
    with torch.no_grad():
        ours, theirs = (model(**inputs).last_hidden_state for model in (minilm, transformers_minilm))
    kept = inputs["attention_mask"].bool()
    assert (ours - theirs)[kept].abs().max() < 1e-5


def test_a_text_alone_and_in_a_batch(minilm, truth, tokenizer, transformers_minilm):
    texts = docstrings(12)
    together = encode(tokenizer, texts)
    with torch.no_grad():
        batched = minilm(**together).last_hidden_state
        for row, text in enumerate(texts):
            alone = encode(tokenizer, [text])
            length = alone["input_ids"].shape[1]
            check_close(
                f"text {row}",
                batched[row, :length],
                minilm(**alone).last_hidden_state[0],
                truth(**alone).last_hidden_state[0],
            )


def test_the_longest_text(minilm, transformers_minilm, tokenizer):
    inputs = encode(tokenizer, [" ".join(docstrings(60)), "short"], max_length=512)
    assert inputs["input_ids"].shape == (2, 512)
    with torch.no_grad():
        ours, theirs = (model(**inputs).last_hidden_state for model in (minilm, transformers_minilm))
    assert (ours - theirs)[inputs["attention_mask"].bool()].abs().max() < 1e-5


@pytest.mark.parametrize("fill", [1.0, 0.5])
def test_peak_memory_is_not_above_transformers(fill, minilm, transformers_minilm):
    input_ids = torch.randint(1000, 20000, (8, 256))
    mask = (torch.arange(256) < torch.linspace(fill * 256, fill * 256 + (1 - fill) * 256, 8)[:, None]).long()
    with torch.inference_mode():
        ours, theirs = (
            peak_memory_bytes(lambda m=m: m(input_ids, mask), input_ids.device) for m in (minilm, transformers_minilm)
        )
    print(f"peak memory {ours / 2**20:.1f} MiB, transformers {theirs / 2**20:.1f} MiB")
    assert ours <= theirs
