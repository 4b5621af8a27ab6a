"""What a type checker knows of `import fastbert`: mypy checks this file, and nothing runs it."""

from sentence_transformers import SentenceTransformer
from typing_extensions import assert_type

import fastbert
from fastbert.heads import BertForMaskedLM
from fastbert.model import BertModel

model = fastbert.BertModel(fastbert.BertConfig())
assert_type(model, BertModel)
assert_type(fastbert.BertForMaskedLM(fastbert.BertConfig()), BertForMaskedLM)
assert_type(fastbert.optimize(model), BertModel)
assert_type(fastbert.restore(model), BertModel)
assert_type(fastbert.graphed(model), BertModel)
assert_type(fastbert.optimize(SentenceTransformer("")), SentenceTransformer)
assert_type(fastbert.explain(model), fastbert.explanation.Explanation)
