from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bsc.eval.browse.browse import write_browser
from bsc.eval.interp.config import InterpConfig
from bsc.eval.interp.material import Materials
from bsc.eval.interp.offline import offline_scores
from bsc.eval.interp.scores import JudgedLatent, LatentScore
from bsc.files import canonical_json
from bsc.train.run import Run
from tests.eval.pages import HOSTILE


@pytest.fixture(scope="session")
def scored(evaluated: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The evaluated run with scores, and explanations of a hostile judge."""
    run = Run(Path(shutil.copytree(evaluated.folder, tmp_path_factory.mktemp("scored") / "small")))
    offline_scores(Materials(run, InterpConfig(latents=8), store=None, model=None))
    score = LatentScore(state="ok", score=0.75, low=0.5, high=1.0, excerpts=4, statuses={})
    lines = [
        JudgedLatent(
            coder=name, latent=latent, rate=0.1, explanation=f"{HOSTILE} of {latent}",
            explanation_state="ok", explained_from=[], tests={"detection": score},
        )
        for name in run.coder_names() for latent in (3, 4)
    ]  # fmt: skip
    folder = run.interp_folder / "judge"
    folder.mkdir(parents=True)
    (folder / "interp.json").write_text("{}")
    text = "".join(canonical_json(one.to_json(), indent=None) for one in lines)
    (folder / "latents.jsonl").write_text(text)
    return run


@pytest.fixture(scope="session")
def browser_folder(scored: Run) -> Path:
    return write_browser(scored).page.parent
