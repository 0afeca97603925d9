"""One step of all coders: the model as it is runs once, then once for each set from its splice on.

The clean pass keeps probabilities of the next token and what runs before each splice
(eval/passes/prefix.py). A set of coders that is spliced in together then costs one forward pass of
what comes after, and one backward pass as far as its first coder. Nothing of the model has a
gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bsc.cache.model.attention import Separation, forward_inputs
from bsc.cache.model.models import LanguageModel
from bsc.cache.model.tokens import ContextBatch
from bsc.eval.passes.prefix import Prefix
from bsc.eval.passes.splice import splice
from bsc.finetuning.config import Loss
from bsc.finetuning.losses import Predictions, clean_predictions, prediction_loss
from bsc.finetuning.tuned_coder import TunedCoder

__all__ = ["Stepper"]


class Stepper:
    """The model with the coders that are spliced into it."""

    def __init__(
        self,
        lm: LanguageModel,
        sets: Sequence[Sequence[TunedCoder]],
        *,
        loss: Loss,
        fvu_weight: float = 1.0,
        packing: str,
        separation: Separation,
        without_tokens: Sequence[int] = (),
        micro_contexts: int,
    ) -> None:
        """Take a model, which is frozen, and sets of coders.

        Args:
            lm: with its head.
            sets: coders that are spliced in together.
            loss: what is made small.
            fvu_weight: of ``"kl+fvu"``: how much more than KL reconstruction weighs.
            packing: how contexts were filled.
            separation: how the model keeps their documents apart.
            without_tokens: token ids whose rows are left as they are.
            micro_contexts: contexts that are worked on at a time.
        """
        self.lm, self.sets, self.loss = lm, sets, loss
        self.fvu_weight = fvu_weight
        self.packing, self.separation = packing, separation
        self.micro_contexts = micro_contexts
        lm.model.requires_grad_(False)
        device = lm.model.device
        self._without_tokens = sorted(without_tokens)
        self._without = (
            torch.tensor(self._without_tokens, device=device) if without_tokens else None
        )
        self._prefixes = {hooks: Prefix(lm.base, hooks) for hooks in map(self._hooks, sets)}
        self._tried = False

    @staticmethod
    def _hooks(coders: Sequence[TunedCoder]) -> tuple[str, ...]:
        return tuple(c.planned.hookpoint for c in coders)

    def step(self, batch: ContextBatch, step: int, steps: int) -> list[str]:
        """Finetune every coder that is still active on a batch of contexts.

        Args:
            batch: contexts of training documents.
            step: of the run, from 0.
            steps: of the run.

        Returns:
            Names of coders that turned non-finite at this step.
        """
        active = [s for s in self.sets if s[0].progress.frozen_at is None]
        if not active:
            return []
        predicted, rows = _counts(batch, self.packing)
        for coder in (c for s in active for c in s):
            coder.begin()
        sums = torch.zeros((len(active), 2), dtype=torch.float64, device=self.lm.model.device)
        for start in range(0, len(batch.token_id), self.micro_contexts):
            part = slice(start, start + self.micro_contexts)
            self._accumulate(batch, part, active, sums, predicted / self._used(batch, rows))
        # All that the host has to know of a step, read at once: each read waits for the device.
        known = torch.stack(
            [
                torch.cat([sums[i], c.figures, c.finite(predicted).double().unsqueeze(0)])
                for i, own in enumerate(active)
                for c in own
            ]
        ).tolist()
        figures = iter(known)
        frozen = []
        for own in active:
            mine = [next(figures) for _ in own]
            if not all(np.isfinite(values).all() and values[-1] for values in mine):
                for coder in own:
                    coder.progress.frozen_at = step
                    frozen.append(coder.planned.name)
                continue
            for coder, (kl, ce, error, on, used, _) in zip(own, mine, strict=True):
                progress, some = coder.progress, max(1.0, used)
                means = [kl / predicted, ce / predicted, error / some, on / some]
                progress.last = [means[0], means[2]]
                progress.sums = [a + b for a, b in zip(progress.sums, [*means, 1.0], strict=True)]
                coder.step(step, steps, rows)
        return frozen

    def _used(self, batch: ContextBatch, rows: int) -> int:
        """Rows of a batch that coders are spliced in at, as far as tokens decide it."""
        ids = batch.rows()["token_id"]
        left_out = np.isin(ids, self._without_tokens).sum() if self._without_tokens else 0
        return max(1, rows - int(left_out))

    def _accumulate(
        self,
        batch: ContextBatch,
        part: slice,
        active: Sequence[Sequence[TunedCoder]],
        sums: Tensor,
        per_row: float,
    ) -> None:
        """Add the gradients of some contexts.

        Args:
            batch: all contexts.
            part: which of them.
            active: sets of coders.
            sums: (sets, 2), KL and CE, which are added to.
            per_row: predicted tokens of the batch over the rows that are spliced in at.
        """
        inputs, kept = self._inputs(batch, part)
        prefixes = {hooks: self._prefixes[hooks] for hooks in map(self._hooks, active)}
        with torch.no_grad(), ExitStack() as stack:
            for prefix in prefixes.values():
                stack.enter_context(prefix.recorded())
            clean = self._clean(batch, part, self._logits(inputs))
        if not self._tried:
            self._tried = True
            with torch.no_grad():
                for prefix in prefixes.values():
                    prefix.try_out(self.lm.model, inputs)
        for i, own in enumerate(active):
            replacements = {c.planned.hookpoint: c.replacement(kept) for c in own}
            with splice(self.lm.base, replacements, kept), prefixes[self._hooks(own)].left_out():
                logits = self._logits(inputs)
            loss, both = prediction_loss(logits, clean, kl=self.loss != "ce")
            sums[i] += both
            if self.loss == "kl+fvu":
                for coder in own:
                    assert coder.error is not None
                    share = self._balance(coder, both, clean) * per_row / len(own)
                    loss = loss + coder.error * (share * self.fvu_weight)
            loss.backward()
            for coder in own:
                coder.error = None

    def _balance(self, coder: TunedCoder, both: Tensor, clean: Predictions) -> Tensor | float:
        """What FVU is multiplied by to weigh as much as KL: their ratio in the step before, and in
        the first one that of the contexts at hand."""
        kl, fvu = coder.progress.last
        if fvu:
            return kl / fvu
        assert coder.error is not None and coder.rows is not None
        with torch.no_grad():
            kl_here = both[0] / clean.weight.sum().clamp(min=1)
            ratio = kl_here / (coder.error / coder.rows.clamp(min=1))
            return ratio.nan_to_num(0, 0, 0)  # of contexts that have no row to learn from

    def _logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """(tokens, vocabulary) in the model's dtype."""
        logits: Tensor = self.lm.model(**inputs, use_cache=False).logits
        return logits.flatten(0, 1)

    def _inputs(self, batch: ContextBatch, part: slice) -> tuple[dict[str, Tensor], Tensor | None]:
        """Arguments of the model, and which rows are left as they are."""
        device = self.lm.model.device
        ids, position = (_moved(a[part], device) for a in (batch.token_id, batch.position))
        real = None if batch.real is None else _moved(batch.real[part], device)
        inputs = forward_inputs(
            ids, position, packing=self.packing, separation=self.separation, real=real,
            dtype=self.lm.model.dtype,
        )  # fmt: skip
        kept = None
        if self._without is not None:
            kept = torch.isin(ids, self._without).flatten()
        if real is not None:
            kept = ~real.flatten() if kept is None else kept | ~real.flatten()
        return inputs, kept

    def _clean(self, batch: ContextBatch, part: slice, logits: Tensor) -> Predictions:
        counted = _predicted(batch, self.packing)[part]
        device = logits.device
        # The last token of a context predicts nothing that is there.
        target = np.roll(batch.token_id[part], -1, axis=1)
        weight = np.zeros(target.shape, np.float32)
        weight[:, :-1] = counted
        return clean_predictions(
            logits, _moved(target, device).flatten(), _moved(weight, device).flatten()
        )


def _moved(array: Any, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _predicted(batch: ContextBatch, packing: str) -> Any:
    """(contexts, length - 1): tokens whose loss counts, from the second one on, as in evaluation
    (eval/passes/contexts.py)."""
    if packing == "masked":
        return batch.position[:, 1:] != 0
    if batch.real is not None:
        return batch.real[:, 1:]
    return np.ones((len(batch.token_id), batch.token_id.shape[1] - 1), bool)


def _counts(batch: ContextBatch, packing: str) -> tuple[int, int]:
    """Predicted tokens and rows of a batch."""
    rows = batch.token_id.size if batch.real is None else int(batch.real.sum())
    return max(1, int(_predicted(batch, packing).sum())), rows
