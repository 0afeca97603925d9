"""What finetuning changed: figures paired by document, latents beside themselves, the page."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from bsc.array_file import read_arrays
from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.model.text_source import TextSource
from bsc.cli import main
from bsc.embedded.corpus import documents
from bsc.eval.config import EvalConfig
from bsc.eval.evaluate import evaluate
from bsc.eval.evaluation import EvaluationFolder
from bsc.eval.finetuned import Changed, finetuned_changes
from bsc.eval.interp.config import InterpConfig
from bsc.eval.interp.material import Materials
from bsc.eval.interp.offline import offline_scores
from bsc.eval.report.report import render_report
from bsc.finetuning.config import FinetuneConfig
from bsc.finetuning.finetune import finetune
from bsc.train.config import TrainConfig
from bsc.train.run import Run
from bsc.train.trainer import train_sweep


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """A run and what became of it, evaluated and scored; of short documents, for intervals."""
    folder = tmp_path_factory.mktemp("pair")
    texts = [d.text[i : i + 150] for d in documents("stdlib") if d.name.startswith("stdlib/email")
             for i in range(0, len(d.text), 300)]  # fmt: skip
    (folder / "short.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    capture(
        CaptureConfig(
            model=str(tiny_model), store=folder / "acts", hookpoints=("layers.2.mlp",),
            text=TextSource(files=(str(folder / "short.jsonl"),), held_out=0.2), tokens=6_000,
            held_out_tokens=2_000, context=32, batch_tokens=512,
        )
    )  # fmt: skip
    before, _ = train_sweep(
        TrainConfig(
            store=folder / "acts", runs=folder, name="before", tokens=12_000, batch_rows=256,
            coders=({"code": ["binary", "continuous"], "k": 4, "n_latents": 64},),
        )
    )  # fmt: skip
    after, _ = finetune(
        before, FinetuneConfig(name="after", tokens=8_192, batch_tokens=256, lr=3e-3)
    )
    for run in (before, after):
        evaluate(run, EvalConfig(ce_tokens=2_000, ablation_bins=0, probe_texts=12))
        offline_scores(Materials(run, InterpConfig(latents=4), store=None, model=None))
    return before, after


@pytest.fixture(scope="module")
def changed(pair: tuple[Run, Run]) -> Changed:
    found = finetuned_changes(*pair)
    assert found is not None
    return found


def test_differences_are_those_of_the_figures(pair: tuple[Run, Run], changed: Changed) -> None:
    before, after = (EvaluationFolder(run).read() for run in pair)
    assert [c.coder for c in changed.coders] == pair[1].coder_names()
    for change in changed.coders:
        f, g = before.coders[change.parent], after.coders[change.coder]
        for name in ("delta_ce", "kl", "fvu", "l0", "bits", "dead", "ultra_per_token"):
            one = getattr(change, name)
            assert (one.first, one.second) == (f[name], g[name])
            assert one.difference == pytest.approx(g[name] - f[name])
        assert change.ultra.first == f.latents_above["0.1"]
        assert change.kl_closed is not None and change.predictability is not None
        assert change.kl_closed.share == pytest.approx(1 - g.kl / f.kl)
        arms = {(p.set, p.arm, p.columns) for p in change.probes}
        assert len(arms) == len(change.probes) == 12
        for p in change.probes:
            after_ = after.probing[p.set].coders[change.coder][p.arm][p.columns]
            assert p.accuracy.second == after_.accuracy


def test_intervals_are_paired_by_document(pair: tuple[Run, Run], changed: Changed) -> None:
    """Against a jackknife that is written out."""
    arrays = [read_arrays(EvaluationFolder(run).documents, "") for run in pair]
    change = changed.coders[-1]
    a, b = (arrays[i][f"{n}/kl"] for i, n in enumerate((change.parent, change.coder)))
    predicted = arrays[0]["predicted"].astype(float)
    used = predicted > 0
    a, b, predicted = a[used], b[used], predicted[used]
    assert change.kl.first == pytest.approx(a.sum() / predicted.sum(), rel=1e-6)
    without = [
        1 - (b.sum() - b[i]) / (a.sum() - a[i]) for i in range(len(a))
    ]  # closed, without document i
    n = len(a)
    error = np.sqrt((n - 1) / n * np.sum((np.array(without) - np.mean(without)) ** 2))
    assert change.kl_closed is not None and change.kl_closed.interval is not None
    low, high = change.kl_closed.interval
    middle = (low + high) / 2
    assert middle == pytest.approx(change.kl_closed.share, abs=1e-9)
    assert 1.9 * error < (high - low) / 2 < 3 * error  # Student's t
    assert change.delta_ce.interval is not None and change.fvu.interval is not None


def test_latents_are_compared_with_themselves(pair: tuple[Run, Run], changed: Changed) -> None:
    for change in changed.coders:
        coders = pair[0].coder(change.parent), pair[1].coder(change.coder)
        counts = [
            read_arrays(EvaluationFolder(run).firing(n), "")["counts"]
            for run, n in zip(pair, (change.parent, change.coder), strict=True)
        ]
        alive = torch.from_numpy((counts[0] + counts[1]) > 0)
        cosines = torch.cosine_similarity(coders[0].W_enc, coders[1].W_enc, dim=1)[alive].double()
        assert change.moved.latents == int(alive.sum())
        assert change.moved.encoder_cosine[1] == pytest.approx(float(cosines.median()), abs=0.02)
        assert change.moved.jaccard is not None and 0 < change.moved.jaccard[1] <= 1
        assert change.moved.decoder_cosine[0] < 1
    same = pair[0].folder.parent / "same"
    copied = Run(Path(shutil.copytree(pair[1].folder, same)))
    for name in copied.coder_names():  # as it began, under the name of what it became
        shutil.copytree(pair[0].coder_folder(name), copied.coder_folder(name), dirs_exist_ok=True)
        codes = EvaluationFolder(copied).codes(name)
        shutil.rmtree(codes)
        shutil.copytree(EvaluationFolder(pair[0]).codes(name), codes)
    found = finetuned_changes(pair[0], copied)
    assert found is not None
    for change in found.coders:
        for values in (change.moved.encoder_cosine, change.moved.decoder_cosine):
            assert values == pytest.approx([1, 1, 1])
        assert change.moved.jaccard == [1, 1, 1]


def test_only_coders_that_began_as_those_are_paired(pair: tuple[Run, Run]) -> None:
    before, after = pair
    assert finetuned_changes(after, before) is None
    assert finetuned_changes(after, after) is None
    moved = Run(Path(shutil.copytree(before.folder, before.folder.parent / "moved")))
    assert finetuned_changes(moved, after) is not None  # known by its weights, not by its place
    name = moved.coder_names()[0]
    coder = moved.coder(name)
    coder.tensors["b_dec"] += 1
    coder.save(moved.coder_folder(name))
    found = finetuned_changes(moved, after)
    assert found is not None and name not in {c.parent for c in found.coders}


def test_the_commands_and_the_page_show_it(
    pair: tuple[Run, Run], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folders = [str(run.folder) for run in pair]
    for arguments in (["compare", *folders], ["compare", *folders, "--json"]):
        with pytest.raises(SystemExit) as done:
            main(arguments)
        assert not done.value.code
    table, _, whole = capsys.readouterr().out.partition("{")
    assert "KL closed" in table and "encoder cosine" in table
    assert len(json.loads("{" + whole)["finetuned"]["coders"]) == len(pair[0].coder_names())
    page = render_report(pair)
    assert "Before and after finetuning" in page and 'id="figure-finetuned-0"' in page
    section = page[page.index('<section id="finetuned">') :]
    section = section[: section.index("</section>")]
    assert section.count("<tr>") == 1 + len(pair[0].coder_names())
    for link in re.findall(r'href="#([^"]+)"', section):
        assert f'id="{link}"' in page, link
    assert "finetuned" not in render_report(pair[:1]).split("<section")[1]
    with pytest.raises(SystemExit) as done:
        main(["report", *folders, "--out", str(tmp_path / "r.html"), "--figures",
              str(tmp_path / "figures")])  # fmt: skip
    assert not done.value.code
    lines = (tmp_path / "figures" / "finetuned.csv").read_text().splitlines()
    columns = "run,before,coder,figure,difference,first,low,high,second"
    assert lines[0] == columns
    assert sum(",kl," in line for line in lines) == len(pair[0].coder_names())
    assert (tmp_path / "figures" / "finetuned-0.svg").exists()
