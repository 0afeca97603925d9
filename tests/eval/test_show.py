"""Contexts in which latents fire, after an evaluation."""

from __future__ import annotations

import json

import pytest
from safetensors.numpy import load_file

import bsc.eval.evaluate
from bsc.cli import main
from bsc.errors import StoreError, UserError
from bsc.eval.config import EvalConfig
from bsc.eval.evaluate import evaluate
from bsc.eval.show import latent_examples
from bsc.train.run import Run


def test_examples_of_any_latent(evaluated: Run) -> None:
    name = evaluated.coder_names()[0]
    counts = load_file(evaluated.coder_folder(name) / "firing.safetensors")["counts"]
    latent = int(counts.argmax())
    found = latent_examples(evaluated, name, latent, per_stratum=2)
    assert found["firings"] == counts[latent]
    assert found["contexts"][0]["stratum"] == 9
    test = latent_examples(evaluated, name, latent, part="test")
    assert {c["part"] for c in test["contexts"]} == {"test"}
    with pytest.raises(UserError, match="no latent 64; they are 0 to 63"):
        latent_examples(evaluated, name, 64)
    with pytest.raises(UserError, match="is not one coder; 8 have it"):
        latent_examples(evaluated, "layers", 0)
    with pytest.raises(UserError, match="--part both"):
        latent_examples(evaluated, name, 0, part="both")


def test_examples_on_the_command_line(evaluated: Run, capsys: pytest.CaptureFixture[str]) -> None:
    name = evaluated.coder_names()[0]
    counts = load_file(evaluated.coder_folder(name) / "firing.safetensors")["counts"]
    with pytest.raises(SystemExit) as done:
        main(["examples", str(evaluated.folder), name, str(counts.argmax())])
    assert not done.value.code
    out = capsys.readouterr().out
    assert f"{counts.max():,} firings" in out and "10/10" in out and "<<" in out
    with pytest.raises(SystemExit):
        main(["examples", str(evaluated.folder), name, str(counts.argmax()), "--json"])
    line = json.loads(capsys.readouterr().out.splitlines()[0])
    assert line["stratum"] == 9 and any(drawn for *_, drawn in line["text"])


def test_examples_of_another_evaluation_are_not_shown(
    evaluated_copy: Run, small: EvalConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bsc.eval.evaluate, "latent_figures", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(evaluated_copy, small.model_copy(update={"rows": 64}))
    with pytest.raises(StoreError, match="no sampled firings"):
        latent_examples(evaluated_copy, evaluated_copy.coder_names()[0], 0)
