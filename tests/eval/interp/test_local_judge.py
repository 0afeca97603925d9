"""`bsc interp` with a judge on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bsc.cli import main
from bsc.eval.interp.judges.local import LocalJudge
from bsc.eval.interp.judges.prompts import test_request as ask_test
from bsc.train.run import Run
from tests.conftest import make_model
from tests.eval.interp.command import SMALL, main_ok


@pytest.fixture(scope="module")
def judge_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("judge"), max_position_embeddings=4096)


def test_a_local_model_answers_by_its_logits(judge_model: Path) -> None:
    judge = LocalJudge(str(judge_model))
    judge.connect()
    requests = [
        ask_test("fuzzing", "c", i, 0, f"word {i}", [[("def ", False), (f"f{i}" * i, True)]])
        for i in range(5)
    ]
    replies: list[Any] = []
    judge.ask(requests, lambda q, r: replies.append(r))
    for request, reply in zip(requests, replies, strict=True):
        # By hand: the logits of the two answers after the prompt.
        text = "".join(m["content"] + "\n\n" for m in request.messages)
        ids = judge._encode(text)
        ends = [judge._encode(f'{{"1": {c}') for c in range(2)]
        same = next(i for i, (a, b) in enumerate(zip(*ends, strict=False)) if a != b)
        with torch.inference_mode():
            logits = judge._lm.model(torch.tensor([ids + ends[0][:same]])).logits[0, -1].float()
        p = float(torch.softmax(logits[[e[same] for e in ends]], 0)[1])
        assert reply.yes[0][1] == pytest.approx(p, abs=0.02)  # bfloat16, in a padded batch
        assert json.loads(reply.text) == {"1": int(reply.yes[0][1] > 0.5)}


def test_a_local_judge_scores_a_run(judge_model: Path, evaluated_copy: Run) -> None:
    name = evaluated_copy.coder_names()[0]
    main_ok("interp", evaluated_copy.folder, "--judge", judge_model, *SMALL, "--coders", name)
    (path,) = evaluated_copy.interp_folder.glob("*/interp.json")
    result = json.loads(path.read_text())
    assert result["config"]["items"] == 1 and result["judge"]["probabilities"]
    test = result["coders"][name]["tests"]["fuzzing"]
    assert 0 <= test["auc"]["unweighted"]["mean"] <= 1
    before = path.read_bytes()
    main_ok("interp", evaluated_copy.folder, "--judge", judge_model, *SMALL, "--coders", name)
    assert path.read_bytes() == before


def test_a_judge_with_a_short_context_says_so(
    tiny_model: Path, evaluated_copy: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["interp", str(evaluated_copy.folder), "--judge", str(tiny_model)])
    assert done.value.code == 2 and "its context is 64 tokens" in capsys.readouterr().err
