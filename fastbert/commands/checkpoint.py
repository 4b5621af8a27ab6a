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


def device_called(name: str | None) -> torch.device:
    """The device of this name, which becomes the current one; by default the GPU if there is one, or else the CPU.

    Raises ValueError for one that is not there.
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
    """The name, which is a folder here or could be one on the hub, which is not asked. Raises OSError for any other."""
    if not Path(name).is_dir():
        try:
            validate_repo_id(name)
        except HFValidationError:
            raise OSError(f"there is no folder {name}, and no model on the hub can have that name") from None
    return name


def _with_weights(name: str) -> str:
    """Where a model's own files lie: sentence-transformers' modules.json may name a folder inside for them."""
    modules = Path(name, "modules.json")
    if not modules.is_file():
        return name
    try:
        return str(Path(name, json.loads(modules.read_text())[0]["path"]))
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{modules} is no list of sentence-transformers' modules") from error


class Checkpoint:
    """A folder, or a name on the hub. Raises OSError for what is none, and ValueError for a model that is not BERT."""

    def __init__(self, name: str):
        self.name = _with_weights(local_or_hub(name))
        is_local = Path(name).is_dir()
        if is_local and not Path(self.name, "config.json").is_file():
            raise OSError(f"there is no config.json in {self.name}")
        try:
            settings, _ = transformers.PretrainedConfig.get_config_dict(self.name)
        except OSError as error:
            if is_local:
                raise
            raise OSError(f"there is no folder {name}, and the hub does not give it: {error}") from error
        model_type = settings.get("model_type")
        if model_type is None:
            raise ValueError(f"the config.json of {self.name} has no model_type: a BERT's would be 'bert'")
        if model_type != "bert":
            raise ValueError(f"{self.name} is a model of type {model_type!r}, and fastbert serves 'bert' alone")
        self.config = transformers.BertConfig.from_pretrained(self.name)

    @cached_property
    def _tokens(self) -> tuple[Tensor, int | None, int | None]:
        """Docstrings end to end in the checkpoint's tokens, int64 [T], and the ids of [CLS] and [SEP]."""
        vocab_size = self.config.vocab_size
        if self.why_no_tokenizer is not None:
            generator = torch.Generator().manual_seed(SEED)
            return torch.randint(vocab_size, (NUM_TEXTS,), generator=generator), None, None
        tokenizer = self._tokenizer
        encoded = tokenizer(docstrings(NUM_TEXTS), add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([token for text in encoded for token in text])
        if tokens.max() >= vocab_size:
            raise ValueError(
                f"the tokenizer of {self.name} gives ids up to {tokens.max()}, and the model has {vocab_size}: they do "
                "not belong together"
            )
        return tokens, tokenizer.cls_token_id, tokenizer.sep_token_id

    @cached_property
    def _tokenizer(self):
        return transformers.AutoTokenizer.from_pretrained(self.name)

    @cached_property
    def why_no_tokenizer(self) -> str | None:
        """Why batches hold random ids; None where they hold texts."""
        try:
            tokenizer = self._tokenizer
        except (ImportError, OSError, ValueError) as error:
            return " ".join(str(error).split())
        # What transformers makes of a folder without a vocabulary.
        return None if len(tokenizer) > len(tokenizer.all_special_ids) else "there is no vocabulary"

    def batch(self, batch_size: int, seq_len: int, first: int = 0) -> dict[str, Tensor]:
        """input_ids and token_type_ids, int64 [B, S], of pairs of texts that fill every place: [CLS] a [SEP] b [SEP].

        `first` is the number of texts in batches before, whose texts are others. Without a tokenizer ids are random.
        """
        tokens, start, end = self._tokens
        places = torch.arange(first, first + batch_size)[:, None] * seq_len + torch.arange(seq_len)
        input_ids, middle = tokens[places % len(tokens)], seq_len // 2
        if end is not None:
            input_ids[:, [middle, -1]] = end
        if start is not None:
            input_ids[:, 0] = start
        token_type_ids = (torch.arange(seq_len) > middle).long().expand(batch_size, -1)
        return {"input_ids": input_ids, "token_type_ids": token_type_ids % self.config.type_vocab_size}

    def pair(self, model_class: str) -> tuple[nn.Module, nn.Module, list[str]]:
        """Our model and transformers' of a class, each loaded by its own library in float32, and the names of the
        parameters that the checkpoint lacks: those are random, and the same in both."""
        ours = getattr(fastbert, model_class).from_pretrained(self.name, **self._loading(model_class))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            theirs, found = getattr(transformers, model_class).from_pretrained(
                self.name, output_loading_info=True, attn_implementation="sdpa", **self._loading(model_class)
            )
        lacking = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
        weights = theirs.state_dict()
        ours.load_state_dict({name: weights[name] for name in lacking}, strict=False)
        return ours.eval(), theirs.eval(), lacking

    def _loading(self, model_class: str) -> dict:
        config = deepcopy(self.config)
        if model_class == "BertForQuestionAnswering":
            config.num_labels = 2  # a start and an end
        return {"config": config, "dtype": torch.float32, "ignore_mismatched_sizes": True}


def right_padding(batch_size: int, seq_len: int) -> Tensor:
    """A mask, bool [B, S], of texts from S tokens down to one in even steps: half of it is padding."""
    lengths = torch.linspace(seq_len, 1, batch_size).long()
    return torch.arange(seq_len) < lengths[:, None]


def served(model: nn.Module) -> str:
    """What `fastbert.explain` says of a model of ours in one line: "triton", or what else serves, how often and why."""
    rows = fastbert.explain(model)
    counted = Counter((row.backend, "" if row.backend == "triton" else row.reason) for row in rows)
    told = []
    for (backend, reason), count in counted.items():
        share = f"{count} of {len(rows)} operations" if len(counted) > 1 else ""
        details = ": ".join(filter(None, (share, reason)))
        told.append(f"{backend} ({details})" if details else backend)
    return ", ".join(told)
