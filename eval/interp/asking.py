"""The questions of a run to one judge: what is asked, what is answered, and asking the rest.

Coder by coder: first every explanation, then every test of those that there are. Each question has
a key in the ledger, so that nothing is asked twice, and what is asked does not depend on what was
asked before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from bsc.errors import UserError, nearest
from bsc.eval.figures.scores import read_table
from bsc.eval.interp.config import TestKind
from bsc.eval.interp.cost import Estimate, Meter, estimate_requests
from bsc.eval.interp.evidence import Evidence
from bsc.eval.interp.judges.judge import Judge
from bsc.eval.interp.judges.prompts import MAX_EXPLANATION, Request, explanation_in, is_refusal
from bsc.eval.interp.judges.reply import Reply
from bsc.eval.interp.judges.wire import whole
from bsc.eval.interp.ledger import Ledger, key_of
from bsc.eval.interp.material import Material, Materials
from bsc.eval.interp.questions import Question, explain_question, test_questions
from bsc.progress import console, stage

__all__ = ["Interpretation"]

_PLACEHOLDER = "x" * 160
"""Stands for an explanation that is not written yet, where only its length matters."""


class Interpretation:
    """The questions of a run to one judge, and what is known of the answers."""

    def __init__(
        self, materials: Materials, ledger: Ledger, model: str, parameters: Mapping[str, Any]
    ) -> None:
        """Begin.

        Args:
            materials: of the run's coders.
            ledger: of the run.
            model: of the judge.
            parameters: of the judge, which decide its answers.
        """
        self.materials, self.config = materials, materials.config
        self.ledger, self.model, self.parameters = ledger, model, dict(parameters)
        self._given = self._given_explanations()

    def key(self, request: Request) -> str:
        """Key of a question to this judge, in the ledger."""
        return key_of(self.model, self.parameters, request)

    def _given_explanations(self) -> dict[tuple[str, int], str] | None:
        source = self.config.explanations
        if source in ("own", "shuffled", "blank"):
            return None
        found = {}
        known = self.materials.every_name
        for number, row in enumerate(
            read_table(source, "--explanations", "coder, latent and explanation"), 1
        ):
            try:
                coder, latent = str(row["coder"]), int(row["latent"])
                found[coder, latent] = whole(str(row["explanation"])[:MAX_EXPLANATION])
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"--explanations {source}, entry {number}: needs coder, latent and explanation "
                    f"({error!r})."
                ) from None
            if coder not in known:
                raise UserError(
                    f"--explanations {source}, entry {number}: no coder {coder!r}"
                    f"{nearest(coder, known)}."
                )
        return found

    # questions

    def explain_questions(self, material: Material) -> Iterator[Question]:
        """Ask for explanations, where the judge writes them."""
        if self.config.explanations in ("own", "shuffled"):
            for latent in material.chosen.latents():
                evidence = material.evidence(latent)
                if evidence.why_not is None:
                    yield self._explain_question(material, evidence)

    def _explain_question(self, material: Material, evidence: Evidence) -> Question:
        return explain_question(material.texts, material.coder, evidence, self.config.seed)

    def explained_from(self, material: Material, evidence: Evidence) -> list[list[list[Any]]]:
        """The excerpts that a judge explained a latent from; none, where it did not."""
        if evidence.why_not is not None or self.config.explanations not in ("own", "shuffled"):
            return []
        question = self._explain_question(material, evidence)
        return [[list(run) for run in excerpt] for excerpt in question.excerpts]

    def explanations(self, material: Material) -> dict[int, tuple[str | None, str]]:
        """The explanation of each latent that can have one, and its state: ok, unparsable,
        refused, failed, not asked."""
        latents = material.chosen.latents()
        if self.config.explanations == "blank":
            return dict.fromkeys(latents, ("", "ok"))
        if self._given is not None:
            found = {i: self._given.get((material.coder, i)) for i in latents}
            return {i: (e, "not asked" if e is None else "ok") for i, e in found.items()}
        own = {q.request.latent: self._explanation(q) for q in self.explain_questions(material)}
        if self.config.explanations == "own":
            return own
        # Each gets that of the next one in an order that no answer changes: nobody keeps its own.
        rng = np.random.Generator(np.random.Philox(key=self.config.seed))
        order = [list(own)[i] for i in rng.permutation(len(own))]
        if len(order) == 1:
            return {order[0]: (None, "not asked")}
        return {a: own[b] for a, b in zip(order, order[1:] + order[:1], strict=True)}

    def _explanation(self, question: Question) -> tuple[str | None, str]:
        key = self.key(question.request)
        reply = self.ledger.get(key)
        if reply is None:
            return None, "failed" if self.ledger.failed(key) else "not asked"
        if reply.status == "refused" or is_refusal(reply.text):
            return None, "refused"
        text = explanation_in(reply.text)
        return text, "unparsable" if text is None else "ok"

    def test_questions(
        self, material: Material, explanations: Mapping[int, tuple[str | None, str]]
    ) -> Iterator[Question]:
        """The questions of all tests about the latents of a coder."""
        for latent in material.chosen.latents():
            evidence = material.evidence(latent)
            explanation = explanations.get(latent, (None, ""))[0]
            for questions in self.tests(material, evidence, explanation).values():
                yield from questions

    def tests(
        self, material: Material, evidence: Evidence, explanation: str | None
    ) -> dict[TestKind, list[Question]]:
        """The questions of each test about a latent that can be asked; none where it cannot."""
        if evidence.why_not is not None:
            return {}
        found: dict[TestKind, list[Question]] = {}
        for kind in self.config.tests:
            # What the intruder test asks does not depend on the explanation.
            if explanation is None and kind != "intruder":
                continue
            found[kind] = test_questions(
                material.texts,
                material.coder,
                evidence,
                explanation or "",
                kind,
                items=self.config.items,
                seed=self.config.seed,
            )
        return found

    # asking

    def unanswered(self, questions: Iterable[Question]) -> dict[str, Request]:
        """Requests that are not in the ledger, each once, by key."""
        found: dict[str, Request] = {}
        for question in questions:
            key = self.key(question.request)
            if key not in self.ledger:
                found.setdefault(key, question.request)
        return found

    def ask(self, judge: Judge, meter: Meter) -> None:
        """Ask whatever has no answer yet, coder by coder: explanations first, then tests.

        Raises:
            UserError: the judge cannot go on. What it has answered is in the ledger.
        """
        connected = False
        for material in self.materials:
            for what in ("explain", "test"):
                requests = self.unanswered(
                    self.explain_questions(material)
                    if what == "explain"
                    else self.test_questions(material, self.explanations(material))
                )
                if not requests:
                    continue
                if not connected:
                    judge.connect()
                    connected = True
                if what == "explain" and not self.config.only:
                    why = material.chosen.why_so_many(self.config.census_rate)
                    console.print(f"{material.coder}: {why}", markup=False)
                self._ask_open(judge, meter, requests, f"{what} {material.coder}")
                if meter.held_back:
                    return

    def _ask_open(
        self, judge: Judge, meter: Meter, requests: Mapping[str, Request], label: str
    ) -> None:
        keys = {id(request): key for key, request in requests.items()}
        with stage(label, len(requests), "requests") as progress:

            def asked(request: Request, reply: Reply) -> None:
                counted = meter.note(request, reply)
                self.ledger.add(keys[id(request)], self.model, request, counted)
                progress.advance(1, f"{meter.spent:,.2f} spent" if meter.spent else "")

            judge.ask(meter.let_through(requests.values()), asked)

    def open_requests(self) -> list[Request]:
        """All that can be asked now."""
        return [
            request
            for material in self.materials
            for questions in (
                self.explain_questions(material),
                self.test_questions(material, self.explanations(material)),
            )
            for request in self.unanswered(questions).values()
        ]

    def estimate(self) -> dict[str, Estimate]:
        """What is still to be asked, by kind. Explanations that are not there yet are taken to be
        of a usual length."""
        total: dict[str, Estimate] = {}
        for material in self.materials:
            explanations = {
                i: (e if e is not None else _PLACEHOLDER, state)
                for i, (e, state) in self.explanations(material).items()
            }
            requests = self.unanswered(
                itertools.chain(
                    self.explain_questions(material), self.test_questions(material, explanations)
                )
            ).values()
            for kind in dict.fromkeys(r.kind for r in requests):
                own = estimate_requests(r for r in requests if r.kind == kind)
                total[kind] = total[kind].plus(own) if kind in total else own
        return total
