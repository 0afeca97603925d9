"""Latents as a table of records."""

from __future__ import annotations

import json

import pytest
from safetensors.numpy import load_file

from bsc.errors import StoreError, UserError
from bsc.eval.evaluation import read_evaluation
from bsc.eval.interp.scores import JudgedLatent, LatentScore
from bsc.eval.latent_table import latents
from bsc.eval.show import latent_examples
from bsc.files import canonical_json
from bsc.train.run import Run


def test_every_latent_with_figures_and_contexts(evaluated: Run) -> None:
    name = evaluated.full_name("skip_transcoder-binary-k8")
    counts = load_file(evaluated.coder_folder(name) / "firing.safetensors")["counts"]
    figures = read_evaluation(evaluated).coders[name]
    found = list(latents(evaluated, "skip_transcoder-binary-k8", contexts=2))
    assert [one.latent for one in found] == list(range(64))
    assert [one.firings for one in found] == counts.tolist()
    assert sum(one.firings == 0 for one in found) == figures.dead
    ultra = {one.latent: one.what for one in figures.ultra}
    assert ultra and {o.latent: o.diagnosis for o in found if o.diagnosis} == ultra
    most = int(counts.argmax())
    assert found[most].contexts == latent_examples(evaluated, name, most, per_stratum=2).contexts
    json.dumps([one.to_json() for one in found])
    assert f"<latent {most} of {name}: {counts.max():,} firings" in str(found[most])
    without = next(latents(str(evaluated.folder), name))
    assert without.contexts == [] and without.firings == counts[0]


def test_scores_and_explanations_are_there_where_they_were_made(evaluated_copy: Run) -> None:
    name = evaluated_copy.coder_names()[0]
    score = LatentScore(state="ok", score=0.75, low=0.5, high=1.0, excerpts=4, statuses={})
    none = LatentScore(state="refused", score=None, low=0.0, high=1.0, excerpts=0, statuses={})
    line = JudgedLatent(
        coder=name, latent=3, rate=0.1, explanation="digits", explanation_state="ok",
        explained_from=[], tests={"detection": score, "fuzzing": none},
    )  # fmt: skip
    folder = evaluated_copy.interp_folder / "judge"
    folder.mkdir(parents=True)
    (folder / "interp.json").write_text("{}")
    lines = [line, line.model_copy(update={"coder": "another"})]
    text = "".join(canonical_json(one.to_json(), indent=None) for one in lines)
    (folder / "latents.jsonl").write_text(text)
    found = list(latents(evaluated_copy, name))
    assert found[3].scores == {"judge/detection": 0.75} and not found[2].scores
    assert found[3].explanations == {"judge": "digits"} and "digits" in repr(found[3])


def test_what_is_missing_is_said(run: Run, evaluated: Run) -> None:
    with pytest.raises(StoreError, match="not evaluated yet"):
        latents(run, "skip_transcoder-binary-k8")
    with pytest.raises(UserError, match="no coder 'nothing'"):
        latents(evaluated, "nothing")
