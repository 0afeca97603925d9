"""What a config says of a model: the class that loads it, how long its contexts may be, and what a
checkpoint of it lacks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import Embedding

from bsc.errors import UserError

__all__ = ["base_of", "class_of", "first_position", "longest_context", "missing_parameters"]


def class_of(name: str, config: Any, *, with_head: bool) -> Any:
    """The class that loads a model of this config.

    Raises:
        UserError: it is not one stack of layers over the tokens, or has no head that predicts them.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    if config.is_encoder_decoder:
        raise UserError(
            f"--model {name}: {config.model_type} has an encoder and a decoder, which read two "
            f"texts. Models of one stack are captured: decoders, and encoders such as BERT."
        )
    if not with_head:
        return transformers.AutoModel
    # This one first: of some models the other one loads the part that reads text alone.
    if config.model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return transformers.AutoModelForImageTextToText
    if config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForCausalLM
    raise UserError(
        f"--model {name}: transformers has no head for {config.model_type} that predicts the next "
        f"token, so there is no loss to measure. Coders of its rows can be trained and looked at "
        f"without."
    )


def _positions(base: torch.nn.Module) -> list[Embedding]:
    """Tables of positions that begin behind that of padding, as RoBERTa's."""
    return [
        module
        for name, module in base.named_modules()
        if name.endswith("position_embeddings")
        and isinstance(module, Embedding)
        and module.padding_idx is not None
    ]


def first_position(base: torch.nn.Module) -> int:
    """Position of the first token of a text."""
    return max((int(t.padding_idx or 0) + 1 for t in _positions(base)), default=0)


def base_of(model: Any) -> torch.nn.Module:
    """A model without its head."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    base: torch.nn.Module = getattr(model, "base_model", model)
    config: Any = getattr(model, "config", None)
    if (
        base is model and config is not None
    ):  # it is without one; or, as Llama 4's, does not say what its head stands on
        alone = MODEL_MAPPING_NAMES.get(config.model_type)
        base = next((m for m in model.children() if type(m).__name__ == alone), base)
    return base


def longest_context(base: torch.nn.Module, config: Any) -> int:
    """Tokens of the longest context in which a token's row depends on that context alone."""
    text = config.get_text_config()
    longest = int(getattr(text, "max_position_embeddings", 0) or 0)
    for table in _positions(base):
        longest = table.num_embeddings - first_position(base)
    # Phi-3's positions are counted otherwise if any context of a batch is longer than this.
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) == "longrope":
        original = rope.get("original_max_position_embeddings")
        original = original or getattr(text, "original_max_position_embeddings", None)
        longest = min(longest, int(original or longest))
    return longest if longest > 0 else 2048


def missing_parameters(model: Any, names: Iterable[str]) -> list[str]:
    """Parameters that a checkpoint lacks; BERT's pooler is behind everything that is captured."""
    parameters = {n for n, _ in model.named_parameters()}
    return sorted(n for n in names if n in parameters and "pooler" not in n.split("."))
