"""The configuration is transformers' own `BertConfig`; here is only what this encoder checks and refuses."""

from transformers import BertConfig
from transformers.activations import ACT2FN

from fastbert._compat import attn_implementation

__all__ = ["ATTENTION_IMPLEMENTATIONS", "BertConfig", "attention_implementation", "check_config"]

ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa")


def attention_implementation(config: BertConfig) -> str:
    """ "eager" or "sdpa", the eager path's attention, by what the configuration names.

    flash_attention_* and flex_attention compute the same. Raises ValueError for a function of somebody's own.
    """
    named = attn_implementation(config)
    if named in ATTENTION_IMPLEMENTATIONS:
        return named
    if named != "flex_attention" and not named.startswith("flash_attention"):
        raise ValueError(
            f"the model's attn_implementation={named!r} is unknown here, and fastbert's own attention would take its "
            "place: model.set_attn_implementation('sdpa') agrees to that"
        )
    return "sdpa"


def check_config(config: BertConfig) -> None:
    """Raise `ValueError` for a configuration whose model would not be a plain BERT encoder.

    transformers serves decoders in another mode of the same class and silently ignores relative positions; a model that
    computes something else than its configuration says is worse than an error.
    """
    refused = {
        "is_decoder": (False, "use transformers.BertLMHeadModel for a decoder"),
        "add_cross_attention": (False, "use transformers.BertModel with transformers.EncoderDecoderModel"),
        "position_embedding_type": ("absolute", "use transformers 4's BertModel, the last that computes it"),
    }
    for setting, (served, way_out) in refused.items():
        value = getattr(config, setting, served)
        if value != served:
            raise ValueError(f"config.{setting}={value!r} is not served, only {served!r}: {way_out}")
    if config.hidden_act not in ACT2FN:
        known = ", ".join(sorted(ACT2FN))
        raise ValueError(f"config.hidden_act={config.hidden_act!r} is unknown; choose one of {known}")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"The hidden size ({config.hidden_size}) is not a multiple of the number of attention heads "
            f"({config.num_attention_heads}), so it cannot be cut into heads"
        )
