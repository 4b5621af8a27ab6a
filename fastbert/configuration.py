"""The configuration is transformers' own `BertConfig`; here is only what this encoder checks and refuses."""

from transformers import BertConfig
from transformers.activations import ACT2FN

__all__ = ["BertConfig", "check_config"]


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
            f"config.hidden_size={config.hidden_size} is not a multiple of "
            f"config.num_attention_heads={config.num_attention_heads}, so it cannot be cut into heads"
        )
