"""Who can be asked: an endpoint, a model on this machine, or nobody but by way of files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from bsc.errors import UserError, nearest
from bsc.eval.interp.config import JudgeConfig
from bsc.eval.interp.judges.facts import JudgeFacts, Parameters
from bsc.eval.interp.judges.prompts import Request
from bsc.eval.interp.judges.reply import Reply

__all__ = ["Judge", "NamedJudge", "open_judge"]


class Judge(Protocol):
    """Somebody who answers questions."""

    model: str
    """Part of the key of every question."""
    facts: JudgeFacts | None
    """What it can do, once it is connected."""

    @property
    def parameters(self) -> Parameters:
        """What decides its answers, part of the key too."""

    def connect(self) -> None:
        """Find out what it can do."""

    def ask(self, requests: Iterable[Request], asked: Callable[[Request, Reply], None]) -> None:
        """Ask every request and hand each reply over as it comes."""


class NamedJudge:
    """A judge who is asked by way of files, with the parameters of an endpoint."""

    def __init__(self, model: str) -> None:
        """By the name that its answers go by in the ledger."""
        self.model = model
        self.facts: JudgeFacts | None = JudgeFacts.of(model, by="files")
        self.parameters: Parameters = {"temperature": 0, "top_p": 1, "seed": 0}

    def connect(self) -> None:
        """There is nobody there."""
        raise UserError(f"{self.model} is asked by way of files: --export, then --import.")

    def ask(self, requests: Iterable[Request], asked: Callable[[Request, Reply], None]) -> None:
        """There is nobody there."""
        self.connect()


def open_judge(config: JudgeConfig) -> Judge:
    """A judge by what a user calls it. An endpoint is asked for its model, and nothing else.

    Raises:
        UserError: there is no such endpoint or model.
    """
    from bsc.eval.interp.judges.connection import PRESETS, EndpointConfig, is_endpoint
    from bsc.eval.interp.judges.endpoint import Endpoint

    judge, model = config.judge, config.judge_model
    assert judge is not None
    if is_endpoint(judge):
        endpoint = Endpoint(
            EndpointConfig.of(
                judge,
                model,
                key_variable=config.judge_key_variable,
                concurrency=config.concurrency,
                timeout=config.timeout,
            )
        )
        endpoint.find_model()
        return endpoint
    if model is not None:
        raise UserError(
            f"--judge-model {model}: only an endpoint has several; --judge {judge} is a model "
            f"itself."
        )
    there = Path(judge).expanduser().exists()
    if not there and (re.search(r":\d|/v\d|^localhost", judge) or nearest(judge, PRESETS)):
        raise UserError(
            f"--judge {judge}: neither a folder nor a URL{nearest(judge, PRESETS)}. A URL begins "
            f"with http:// or https://; short names are {', '.join(PRESETS)}."
        )
    from bsc.eval.interp.judges.local import LocalJudge

    try:
        return LocalJudge(judge, device=config.device)
    except UserError as error:
        raise UserError(str(error).replace("--model ", "--judge ")) from None
