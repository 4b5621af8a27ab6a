"""The base class of all models: transformers' loading and saving, with checks of what fastbert supports."""

import sys
from json import JSONDecodeError
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError
from transformers import PreTrainedConfig
from transformers.models.bert import modeling_bert as hf

from fastbert.configuration import ATTENTION_IMPLEMENTATIONS, BertConfig, check_config


def _unreadable(checkpoint, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, UnpicklingError):
        reason = "not a checkpoint of plain tensors"  # torch's message recommends unsafe loading
    return (
        f"the weights of {checkpoint} cannot be read ({reason}): a file is damaged or cut short, fetch or save it again"
    )


class BertPreTrainedModel(hf.BertPreTrainedModel):
    """transformers' loading, saving, resizing and tying, with more checks and clearer errors."""

    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    # The encoder collects hidden states and attentions: transformers' hooks would record packed tensors.
    _can_record_outputs = {}
    # Old checkpoints contain this buffer.
    _keys_to_ignore_on_load_unexpected = [r"position_ids$"]
    # The losses are means over the batch, so Trainer must divide them by its accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: BertConfig, *args, **kwargs):
        if isinstance(config, PreTrainedConfig):  # transformers has an error for anything else
            check_config(config)
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers. Raises OSError that names the checkpoint if it is missing or unreadable."""
        path = Path(pretrained_model_name_or_path or ".").expanduser()
        if path.is_absolute() and not path.exists():
            raise FileNotFoundError(f"there is no checkpoint at {path}: pass a folder with config.json, or a hub name")
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except (SafetensorError, UnpicklingError, JSONDecodeError, EOFError) as error:
            raise OSError(_unreadable(pretrained_model_name_or_path, error)) from error
        except RuntimeError as error:
            # torch's reader of zip archives has no error class of its own.
            if "PytorchStreamReader" not in str(error):
                raise
            raise OSError(_unreadable(pretrained_model_name_or_path, error)) from error
        except OSError as error:
            if str(pretrained_model_name_or_path) in str(error):
                raise
            raise OSError(f"{pretrained_model_name_or_path} cannot be loaded: {error}") from error

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        if attn_implementation not in (None, *ATTENTION_IMPLEMENTATIONS):
            raise ValueError(
                f'Specified `attn_implementation="{attn_implementation}"` is not supported: choose one of '
                f"{', '.join(ATTENTION_IMPLEMENTATIONS)} for the eager path (on a GPU fastbert's own kernels attend)"
            )
        return attn_implementation or "sdpa"

    def _apply(self, *args, **kwargs):
        """As in torch, where it moves and casts the model. CUDA graphs, which hold the old tensors, are freed first."""
        graphs = sys.modules.get("fastbert.graphs")  # not imported here: it imports this module
        if graphs is not None:
            graphs.free_graphs(self)
        return super()._apply(*args, **kwargs)

    get_correct_attn_implementation = _check_and_adjust_attn_implementation  # type: ignore[assignment]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Always True. transformers infers this from a model's source code and would only log a warning."""
        return True
