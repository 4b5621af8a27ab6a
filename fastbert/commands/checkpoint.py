"""A checkpoint as `fastbert verify` and `fastbert bench` use it: batches of real texts, and models of both libraries.

Letters as in `fastbert.tokens`.
"""

import json
from collections import Counter
from copy import deepcopy
from functools import cached_property
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor, nn

import fastbert
from fastbert.commands.texts import docstrings

NUM_TEXTS, SEED = 1000, 0


def select_device(name: str | None) -> torch.device:
    """Return the device of this name and make it the current one. None means a GPU if there is one, else the CPU.

    Raises ValueError for a device that does not exist.
    """
    count = torch.cuda.device_count()
    known = ["cpu", *(["cuda"] if count else []), *(f"cuda:{index}" for index in range(count))]
    if name is not None and name not in known:
        raise ValueError(f"there is no device {name!r} here, only {', '.join(known)} (torch {torch.__version__})")
    device = torch.device(name or ("cuda" if count else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def local_or_hub(name: str) -> str:
    """Return the name if it is a local folder or a valid name on the hub, which is not queried. Else raise OSError."""
    if not Path(name).is_dir():
        try:
            validate_repo_id(name)
        except HFValidationError:
            raise OSError(f"there is no folder {name}, and it is not a valid name on the hub") from None
    return name


def _weights_folder(name: str) -> str:
    """The folder of the model's own files, which sentence-transformers' modules.json may put into a subfolder."""
    modules = Path(name, "modules.json")
    if not modules.is_file():
        return name
    try:
        return str(Path(name, json.loads(modules.read_text())[0]["path"]))
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{modules} is not a list of sentence-transformers' modules") from error


class Checkpoint:
    """A local folder or a model on the hub. Raises OSError if there is none, ValueError for a model other than BERT."""

    def __init__(self, name: str):
        self.name = _weights_folder(local_or_hub(name))
        is_local = Path(name).is_dir()
        if is_local and not Path(self.name, "config.json").is_file():
            raise OSError(f"there is no config.json in {self.name}")
        try:
            settings, _ = transformers.PretrainedConfig.get_config_dict(self.name)
        except OSError as error:
            if is_local:
                raise
            raise OSError(f"there is no folder {name}, and it cannot be loaded from the hub: {error}") from error
        model_type = settings.get("model_type")
        if model_type is None:
            raise ValueError(f"the config.json of {self.name} has no model_type: BERT has 'bert'")
        if model_type != "bert":
            raise ValueError(f"{self.name} is a model of type {model_type!r}, but fastbert supports only 'bert'")
        self.config = transformers.BertConfig.from_pretrained(self.name)

    @cached_property
    def _tokens(self) -> tuple[Tensor, int | None, int | None]:
        """The tokens of many docstrings, int64 [T], and the ids of [CLS] and [SEP]."""
        vocab_size = self.config.vocab_size
        if self.why_no_tokenizer is not None:
            generator = torch.Generator().manual_seed(SEED)
            return torch.randint(vocab_size, (NUM_TEXTS,), generator=generator), None, None
        tokenizer = self._tokenizer
        encoded = tokenizer(docstrings(NUM_TEXTS), add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([token for text in encoded for token in text])
        if tokens.max() >= vocab_size:
            raise ValueError(
                f"the tokenizer of {self.name} gives ids up to {tokens.max()}, but the model has {vocab_size} words: "
                "put the model's own tokenizer into the folder"
            )
        return tokens, tokenizer.cls_token_id, tokenizer.sep_token_id

    @cached_property
    def _tokenizer(self):
        return transformers.AutoTokenizer.from_pretrained(self.name)

    @cached_property
    def why_no_tokenizer(self) -> str | None:
        """Why batches hold random ids; None if they hold texts."""
        try:
            tokenizer = self._tokenizer
        except (ImportError, OSError, ValueError) as error:
            return " ".join(str(error).split())
        # For a folder without a vocabulary transformers makes a tokenizer of special tokens only.
        return None if len(tokenizer) > len(tokenizer.all_special_ids) else "there is no vocabulary"

    def batch(self, batch_size: int, seq_len: int, first: int = 0) -> dict[str, Tensor]:
        """input_ids and token_type_ids, int64 [B, S], of pairs of texts without padding: [CLS] a [SEP] b [SEP].

        first: the number of sequences in earlier batches, so that texts differ. Ids are random without a tokenizer.
        """
        tokens, start, end = self._tokens
        indices = torch.arange(first, first + batch_size)[:, None] * seq_len + torch.arange(seq_len)
        input_ids, middle = tokens[indices % len(tokens)], seq_len // 2
        if end is not None:
            input_ids[:, [middle, -1]] = end
        if start is not None:
            input_ids[:, 0] = start
        token_type_ids = (torch.arange(seq_len) > middle).long().expand(batch_size, -1)
        return {"input_ids": input_ids, "token_type_ids": token_type_ids % self.config.type_vocab_size}

    def pair(self, model_class: str) -> tuple[nn.Module, nn.Module, list[str]]:
        """Our model and transformers' of a class, both in float32, and the names of parameters that are missing in the
        checkpoint. Missing ones are random, and equal in both models."""
        ours = getattr(fastbert, model_class).from_pretrained(self.name, **self._loading(model_class))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            theirs, found = getattr(transformers, model_class).from_pretrained(
                self.name, output_loading_info=True, attn_implementation="sdpa", **self._loading(model_class)
            )
        missing = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
        weights = theirs.state_dict()
        ours.load_state_dict({name: weights[name] for name in missing}, strict=False)
        return ours.eval(), theirs.eval(), missing

    def _loading(self, model_class: str) -> dict:
        config = deepcopy(self.config)
        if model_class == "BertForQuestionAnswering":
            config.num_labels = 2  # a start and an end
        return {"config": config, "dtype": torch.float32, "ignore_mismatched_sizes": True}


def right_padding(batch_size: int, seq_len: int) -> Tensor:
    """A mask, bool [B, S], of sequences from S tokens down to one in even steps. About half of it is padding."""
    lengths = torch.linspace(seq_len, 1, batch_size).long()
    return torch.arange(seq_len) < lengths[:, None]


def describe_backends(model: nn.Module) -> str:
    """`fastbert.explain` of a model in one line: "triton", or all back ends with their shares and reasons."""
    rows = fastbert.explain(model)
    counted = Counter((row.backend, "" if row.backend == "triton" else row.reason) for row in rows)
    described = []
    for (backend, reason), count in counted.items():
        share = f"{count} of {len(rows)} operations" if len(counted) > 1 else ""
        details = ": ".join(filter(None, (share, reason)))
        described.append(f"{backend} ({details})" if details else backend)
    return ", ".join(described)
