"""What an installed fastbert must do without its repository: `python -I tests/tools/smoke.py`."""

import importlib
import pkgutil
import subprocess
import sysconfig
from importlib import resources
from pathlib import Path

import torch
import transformers

import fastbert
import fastbert_kernels

INSTALLED = Path(sysconfig.get_path("purelib"))


def main() -> None:
    for package in (fastbert, fastbert_kernels):
        assert INSTALLED in Path(package.__file__).parents, f"{package.__file__} does not lie in {INSTALLED}"
        assert (resources.files(package) / "py.typed").is_file(), f"{package.__name__} has no py.typed"
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            try:
                importlib.import_module(module.name)
            except ImportError as error:  # `fastbert encode` and `fastbert.ray` need an extra, and say which
                if "pip install 'fastbert-triton[" not in str(error):
                    raise
    configs = {path.name for path in (resources.files(fastbert_kernels) / "configs").iterdir()}
    assert {"default.json", "sm_90.json"} <= configs, configs

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    theirs = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
    ours = fastbert.BertModel(fastbert.BertConfig(**sizes)).eval()
    ours.load_state_dict(theirs.state_dict())
    ids, mask = torch.tensor([[101, 7592, 102], [101, 102, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    with torch.inference_mode():
        pooled, expected = (model(ids, attention_mask=mask).pooler_output for model in (ours, theirs))
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-5)

    command = Path(sysconfig.get_path("scripts")) / "fastbert"
    printed = subprocess.run([command, "info"], check=True, capture_output=True, text=True).stdout
    assert fastbert.__version__ in printed, printed
    print(f"fastbert {fastbert.__version__} works in {INSTALLED}")


if __name__ == "__main__":
    main()
