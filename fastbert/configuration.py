"""Checks of transformers' `BertConfig`: settings that this encoder does not support raise ValueError."""

from transformers import BertConfig
from transformers.activations import ACT2FN

from fastbert._compat import attn_implementation

__all__ = ["ATTENTION_IMPLEMENTATIONS", "BertConfig", "attention_implementation", "check_config"]

ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa")


def attention_implementation(config: BertConfig) -> str:
    """The attention of the eager path, "eager" or "sdpa", for the attention that the configuration names.

    flash_attention_* and flex_attention compute the same as "sdpa", which is also the default of a configuration that
    names none. Raises ValueError for an unknown name.
    """
    named = attn_implementation(config) or "sdpa"
    if named in ATTENTION_IMPLEMENTATIONS:
        return named
    if named != "flex_attention" and not named.startswith("flash_attention"):
        raise ValueError(
            f"attn_implementation={named!r} of the model is unknown, and fastbert would run its own attention instead: "
            "call model.set_attn_implementation('sdpa') to accept that"
        )
    return "sdpa"


def check_config(config: BertConfig) -> None:
    """Raise `ValueError` for a configuration whose model would not be a plain BERT encoder.

    transformers silently ignores relative positions; fastbert raises instead.
    """
    supported: dict[str, tuple[object, str]] = {
        "is_decoder": (False, "use transformers.BertLMHeadModel for a decoder"),
        "add_cross_attention": (False, "use transformers.BertModel with transformers.EncoderDecoderModel"),
        "position_embedding_type": ("absolute", "use BertModel of transformers 4, the last with such positions"),
    }
    for setting, (only, way_out) in supported.items():
        value = getattr(config, setting, only)
        if value != only:
            raise ValueError(f"config.{setting}={value!r} is not supported, only {only!r}: {way_out}")
    if config.hidden_act not in ACT2FN:
        known = ", ".join(sorted(ACT2FN))
        raise ValueError(f"config.hidden_act={config.hidden_act!r} is unknown; choose one of {known}")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"The hidden size ({config.hidden_size}) is not a multiple of the number of attention heads "
            f"({config.num_attention_heads}): change one of them"
        )
