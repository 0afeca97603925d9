"""One text through the model: which latents fire where, and what an edit of them does.

Knows nothing of HTTP. What comes in is a text of a stranger and what goes out is JSON.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from bsc.cache.model.attention import forward_inputs
from bsc.cache.model.tokens import tokenise
from bsc.config import Config
from bsc.devices import pick_device
from bsc.errors import UserError
from bsc.eval.browse.pages import visible
from bsc.eval.figures.split_text import token_strings
from bsc.eval.passes import edits
from bsc.eval.passes.inside import splice
from bsc.eval.passes.setting import matching_model, open_store
from bsc.eval.report.links import coder_slug
from bsc.formats import printable
from bsc.train.coders.coder import Code, SparseCoder
from bsc.train.run import Run

__all__ = ["MAX_TOKENS", "Question", "Workbench"]

MAX_TOKENS = 512
"""Tokens of a text that are looked at."""
LATENTS = 24
"""Latents of a token that are named, the strongest ones."""
NEXT = 10
"""Next tokens that are named, before the edit and after it."""
_LARGEST = float(torch.finfo(torch.float32).max)
_Latents = list[list[tuple[int, float, float]]]
"""Of each token latent, value and margin of what fires."""
_HELD = 8
"""Coders that are held in memory."""

Value = Annotated[float, Field(strict=True)]


class Question(Config):
    """What is asked of the workbench."""

    text: str = Field(max_length=20_000)
    coder: str
    edits: dict[int, Value] = Field(default_factory=dict, max_length=64)
    """Values of latents, on every token; 0 turns one off."""
    error: bool = True
    """Whether what the coder leaves out is added, so that the edit alone acts."""


class Workbench:
    """A run's coders and its model."""

    def __init__(
        self,
        run: Run,
        coders: Sequence[str] = (),
        *,
        store: str | Path | None = None,
        model: str | None = None,
        device: str | None = None,
    ) -> None:
        """Open the model of a run.

        Raises:
            UserError: the store or the model is not there, or no finite coder has such a name.
        """
        self.run = run
        self.names, _ = run.finite_names(coders)
        self._planned = {c.name: c for c in run.config().coders}
        opened = open_store(run, store)
        self.lm = matching_model(opened, model, pick_device(device))
        self.max_tokens = min(MAX_TOKENS, self.lm.context)
        self._without = torch.tensor(run.config().without_tokens, dtype=torch.int64)
        self._one_at_a_time = threading.Lock()
        self._coder = lru_cache(maxsize=_HELD)(self._load)
        self._alone: dict[int, str] = {}

    def _load(self, name: str) -> SparseCoder:
        return self.run.coder(name).to(self.lm.model.device)

    def about(self) -> dict[str, Any]:
        """What there is to choose from."""
        pages = self.run.browse_folder / "coders"
        return {
            "run": printable(self.run.folder.resolve().name),
            "max_tokens": self.max_tokens,
            "coders": [
                {
                    "name": name,
                    "code": self._planned[name].coder.code,
                    "latents": self._planned[name].coder.n_latents,
                    "pages": coder_slug(name) if (pages / coder_slug(name)).is_dir() else None,
                }
                for name in self.names
            ],
        }

    @torch.inference_mode()
    def look(self, asked: Question) -> dict[str, Any]:
        """Tokens of a text, latents that fire on each, and next tokens before and after an edit.

        Raises:
            UserError: there is no such coder or latent, or the text has no token.
        """
        if asked.coder not in self.names:
            raise UserError(f"no coder {asked.coder!r} here.")
        width = self._planned[asked.coder].coder.n_latents
        if any(abs(value) > _LARGEST for value in asked.edits.values()):
            raise UserError("a value is too large for float32.")
        if strange := [i for i in asked.edits if not 0 <= i < width]:
            raise UserError(f"{asked.coder}: no latent {strange[0]}; they are 0 to {width - 1}.")
        ids = tokenise(self.lm.tokenizer, [asked.text])[0]
        if not ids:
            raise UserError("the text has no token.")
        kept = ids[: self.max_tokens]
        with self._one_at_a_time:
            before, after, latents = self._forward(kept, asked)
        strings = token_strings(self.lm.tokenizer, kept, self._alone)
        log_before, log_after = before.log_softmax(dim=-1), after.log_softmax(dim=-1)
        kl = (log_before.exp() * (log_before - log_after)).sum(dim=-1).clamp(min=0)
        return {
            "tokens": [printable(s, lines=True) for s in strings],
            "left_out": len(ids) - len(kept),
            "latents": latents,
            "kl": _rounded(kl),
            "next": [
                self._next(b, a) for b, a in zip(log_before.exp(), log_after.exp(), strict=True)
            ],
            "edited": bool(asked.edits),
        }

    def _forward(self, ids: Sequence[int], asked: Question) -> tuple[Tensor, Tensor, _Latents]:
        """Logits, (tokens, V), before and after the edit, and what fires before it.

        Tokens that the run was trained without keep what the model makes of them.
        """
        model, coder = self.lm.model, self._coder(asked.coder)
        at = {self._planned[asked.coder].hookpoint: coder}
        token_id = torch.tensor([ids], device=model.device)
        position = torch.arange(len(ids), device=model.device).unsqueeze(0)
        inputs = forward_inputs(token_id, position, packing="none", dtype=model.dtype)
        acts = ~torch.isin(token_id, self._without.to(model.device))
        with splice(model, at, error=asked.error, tokens=acts) as codes:
            before = model(**inputs, use_cache=False).logits[0].float()
        code = next(iter(codes.values()))
        after = before
        if asked.edits:
            edit = edits.set(asked.edits)
            with splice(model, at, edit=edit, error=asked.error, tokens=acts):
                after = model(**inputs, use_cache=False).logits[0].float()
        return before, after, _strongest(Code(*(t[0] for t in code)), acts[0])

    def _next(self, before: Tensor, after: Tensor) -> list[tuple[str, float, float]]:
        """The likeliest next tokens, before or after, with both probabilities."""
        n = min(NEXT, len(before))
        chosen = torch.cat([before.topk(n).indices, after.topk(n).indices]).unique()
        chosen = chosen[torch.maximum(before, after)[chosen].argsort(descending=True)]
        return [
            (visible(self._string(int(t))), float(before[t]), float(after[t])) for t in chosen
        ]  # fmt: skip

    def _string(self, token: int) -> str:
        if token not in self._alone:
            self._alone[token] = "".join(token_strings(self.lm.tokenizer, [token]))
        return self._alone[token]


def _strongest(code: Code, acts: Tensor) -> _Latents:
    """Of each token the latents that fire, by how far they are above their threshold."""
    found = []
    columns = (code.latent, code.value, code.margin, acts)
    for latent, value, margin, on in zip(*(t.cpu() for t in columns), strict=True):
        fires = (value != 0) & on
        latent, value, margin = latent[fires], value[fires].float(), margin[fires].float()
        order = margin.argsort(descending=True)[:LATENTS]
        named = (latent[order].tolist(), _rounded(value[order]), _rounded(margin[order]))
        found.append(list(zip(*named, strict=True)))
    return found


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{x:.5g}") for x in values.tolist()]
