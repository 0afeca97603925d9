"""Cross-entropy of the language model, as it is and with something spliced in.

All losses are in nats per predicted token, over the same held-out contexts, so that differences
are paired token by token. Intervals are bootstrapped over contexts.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from bsc.cache.models import LanguageModel
from bsc.cache.store import StoreSplit
from bsc.errors import StoreError
from bsc.eval.splice import Replacement, splice

__all__ = ["context_losses", "contexts_of", "paired_difference"]

_TOKENS_AT_ONCE = 8_192
_RESAMPLES = 2_000


def contexts_of(split: StoreSplit, context: int, max_tokens: int) -> NDArray[np.int64]:
    """Whole contexts of a split whose rows are in order, as the model saw them.

    Returns:
        Token ids, (contexts, context).

    Raises:
        StoreError: the split holds no whole context.
    """
    ids, position = split.tokens("token_id"), split.tokens("position")
    starts = np.flatnonzero(position == 0)
    whole = starts[starts + context <= len(ids)]
    # A context is whole when its last token has the last position.
    whole = whole[position[whole + context - 1] == context - 1]
    whole = whole[: max(1, max_tokens // context)]
    if len(whole) == 0:
        raise StoreError(f"{split.root}: the held-out rows hold no whole context of {context}.")
    contexts: NDArray[np.int64] = ids[whole[:, None] + np.arange(context)].astype(np.int64)
    return contexts


@torch.inference_mode()
def context_losses(
    lm: LanguageModel, token_ids: NDArray[np.int64], replacements: dict[str, Replacement]
) -> NDArray[np.float64]:
    """Mean loss of each context, (contexts,), in nats per predicted token.

    Args:
        lm: a model with its head.
        token_ids: (contexts, length).
        replacements: what to splice in, by module name; empty for the model as it is.
    """
    device = lm.model.device
    at_once = max(1, _TOKENS_AT_ONCE // token_ids.shape[1])
    losses = []
    with splice(lm.base, replacements):
        for start in range(0, len(token_ids), at_once):
            ids = torch.from_numpy(token_ids[start : start + at_once]).to(device)
            logits = lm.model(input_ids=ids, use_cache=False).logits[:, :-1]
            nats = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
            )
            losses.append(nats.view(len(ids), -1).double().mean(dim=1).cpu().numpy())
    return np.concatenate(losses)


def paired_difference(
    changed: NDArray[np.float64], clean: NDArray[np.float64], *, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Mean of changed - clean with its 95 % interval, bootstrapped over contexts.

    Args:
        changed: losses with something spliced in, (contexts,).
        clean: losses of the same contexts without.
        seed: of the resampling.
    """
    difference = changed - clean
    rng = np.random.Generator(np.random.Philox(key=seed))
    resampled = rng.choice(difference, size=(_RESAMPLES, len(difference))).mean(axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(difference.mean()), (float(low), float(high))
