"""Output objects made without transformers' constructors equal those made with them."""

import pickle
from dataclasses import fields

import pytest
import torch
from transformers import modeling_outputs

from fastbert.outputs import output_of

KINDS = [
    modeling_outputs.BaseModelOutputWithPoolingAndCrossAttentions,
    modeling_outputs.SequenceClassifierOutput,
    modeling_outputs.TokenClassifierOutput,
    modeling_outputs.MultipleChoiceModelOutput,
    modeling_outputs.QuestionAnsweringModelOutput,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_output_is_what_its_constructor_makes(kind):
    names = [field.name for field in fields(kind)]
    for given in (names, names[:1], names[1:2], names[::2]):
        values = dict.fromkeys(names) | {name: torch.rand(2) for name in given}
        made, expected = output_of(kind, **values), kind(**values)
        assert type(made) is kind
        assert vars(made) == vars(expected)
        assert list(made.items()) == list(expected.items())
        assert made.to_tuple() == expected.to_tuple()
        assert all(map(torch.equal, pickle.loads(pickle.dumps(made)).values(), expected.values()))
        made[given[0]] = other = torch.rand(2)
        assert getattr(made, given[0]) is other
    # Outputs do not share values.
    assert all(getattr(output_of(kind), name) is None for name in names)
