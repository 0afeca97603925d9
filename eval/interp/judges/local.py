"""A judge on this machine: a transformers model, asked by the logits of its answer tokens.

Nothing has to be parsed: the reply is begun for the model, up to where the answer stands, and the
probabilities of the possible answers are compared. Explanations are generated greedily. Questions
have one excerpt each, so that every answer has the same prompt before it.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from bsc.cache.model.models import load_model
from bsc.devices import pick_device
from bsc.errors import UserError
from bsc.eval.interp.judges.facts import JudgeFacts, Parameters
from bsc.eval.interp.judges.prompts import CANARY, Request
from bsc.eval.interp.judges.reply import Reply

__all__ = ["LocalJudge"]

_AT_ONCE = 16
"""Questions in one forward pass."""
_EXPLANATION_TOKENS = 80


class LocalJudge:
    """A causal language model with its tokenizer."""

    def __init__(self, name: str, *, device: str | None = None) -> None:
        """Load it.

        Args:
            name: as of `bsc cache --model`.
            device: where to compute; None: a GPU where there is one.

        Raises:
            UserError: there is no such model.
        """
        self._name, self._device = name, device
        self._lm: Any = None
        self.model = ""
        self.facts: JudgeFacts | None = None
        self.parameters: Parameters = {"answers": "logits", "explanations": "greedy"}
        self.find_model()

    @property
    def label(self) -> str:
        """Name of its results."""
        return self._name.rstrip("/").split("/")[-1]

    def find_model(self) -> None:
        """Load it, since its weights are its identity."""
        if self._lm is None:
            self._lm = load_model(self._name, device=pick_device(self._device), with_head=True)
            identity = self._lm.identity()
            which = identity["revision"] or identity["weights_sha256"]
            self.model = f"{identity['name']}@{str(which)[:12]}"

    def connect(self) -> None:
        """Say what it is.

        Raises:
            UserError: its context is too short for the prompts.
        """
        if (needed := len(self._prompt(CANARY)) + 8) > self._lm.context:
            raise UserError(
                f"judge {self.model}: its context is {self._lm.context} tokens, and a short "
                f"question takes {needed}. Use a model with a longer context."
            )
        self.facts = JudgeFacts.of(
            self.model,
            echoed_model=self.model,
            repeatable=True,
            probabilities=True,
            structured_output="logits",
        )

    def ask(self, requests: Iterable[Request], asked: Callable[[Request, Reply], None]) -> None:
        """Ask every request and hand each reply over as it comes."""
        source = iter(requests)
        while batch := list(itertools.islice(source, _AT_ONCE)):
            for kind in dict.fromkeys(r.kind for r in batch):
                own = [r for r in batch if r.kind == kind]
                started = time.monotonic()
                replies = self._explained(own) if kind == "explain" else self._answered(own)
                for request, reply in zip(own, replies, strict=True):
                    asked(request, reply._replace(seconds=time.monotonic() - started))

    def _prompt(self, request: Request) -> list[int]:
        """Ids of the messages, up to where the reply begins."""
        messages, tokenizer = list(request.messages), self._lm.tokenizer
        if getattr(tokenizer, "chat_template", None):
            text = str(
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            )
        else:
            # A base model goes on with a text.
            text = "".join(m["content"] + "\n\n" for m in messages)
        return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        return list(self._lm.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _inputs(self, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask, padded on the left."""
        longest = max(map(len, ids))
        padded = torch.zeros(len(ids), longest, dtype=torch.long)
        mask = torch.zeros_like(padded)
        for i, own in enumerate(ids):
            padded[i, longest - len(own) :] = torch.tensor(own)
            mask[i, longest - len(own) :] = 1
        device = self._lm.model.device
        return padded.to(device), mask.to(device)

    def _answered(self, requests: Sequence[Request]) -> list[Reply]:
        """Answers to questions of one kind, by the probabilities of their first tokens."""
        intruder = requests[0].kind == "intruder"
        choices = range(1, requests[0].items + 1) if intruder else range(2)
        begun = [self._encode(f'{{"{"intruder" if intruder else 1}": {c}') for c in choices]
        # Up to where they differ the answers are begun for the model.
        same = next(i for i, tokens in enumerate(zip(*begun, strict=False)) if len({*tokens}) > 1)
        prompts = [self._prompt(r) + begun[0][:same] for r in requests]
        fitting = [i for i, p in enumerate(prompts) if len(p) <= self._lm.context]
        replies = [self._too_long(len(p)) for p in prompts]
        if not fitting:
            return replies
        ids, mask = self._inputs([prompts[i] for i in fitting])
        with torch.inference_mode():
            logits = (
                self._lm.model(
                    input_ids=ids,
                    attention_mask=mask,
                    use_cache=False,
                    position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                )
                .logits[:, -1]
                .float()
            )
            shares = torch.softmax(logits[:, [b[same] for b in begun]], -1).tolist()
        for i, p in zip(fitting, shares, strict=True):
            best = choices[max(range(len(p)), key=p.__getitem__)]
            text = json.dumps({"intruder" if intruder else "1": best})
            yes = (
                [[float(c), q] for c, q in zip(choices, p, strict=True)]
                if intruder
                else [[float(text.index(":") + 2), p[1]]]
            )
            replies[i] = Reply("ok", text, yes, prompt_tokens=len(prompts[i]), completion_tokens=1)
        return replies

    def _too_long(self, tokens: int) -> Reply:
        return Reply("failed", error=f"{tokens} tokens, the context is {self._lm.context}")

    def _explained(self, requests: Sequence[Request]) -> list[Reply]:
        begun = self._encode('{"explanation": "')
        replies = []
        for request in requests:
            prompt = self._prompt(request) + begun
            room = min(request.max_tokens, _EXPLANATION_TOKENS)
            if len(prompt) + room > self._lm.context:
                replies.append(self._too_long(len(prompt) + room))
                continue
            ids, mask = self._inputs([prompt])
            with torch.inference_mode():
                made = self._lm.model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=room,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    pad_token_id=0,
                )
            new = made[0, len(prompt) :]
            said = str(self._lm.tokenizer.decode(new, skip_special_tokens=True))
            sentence = said.split('"')[0].strip().split("\n")[0]
            replies.append(
                Reply(
                    "ok",
                    json.dumps({"explanation": sentence}),
                    prompt_tokens=len(prompt),
                    completion_tokens=len(new),
                )
            )
        return replies
