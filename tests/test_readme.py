"""The README's code runs, with MiniLM in the place of the models it names."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_every_code_block_runs(minilm_path, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        code = re.sub(r'from_pretrained\("[^"]*"', f'from_pretrained("{minilm_path}"', block)
        assert code.count(minilm_path) == block.count("from_pretrained")
        exec(code, names)
    assert "encoder.layer.0-5" in capsys.readouterr().out
    assert names["classifier"].bert.embeddings.word_embeddings.weight.grad.any()
