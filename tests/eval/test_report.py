from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from bsc.errors import StoreError
from bsc.eval.evaluation import EVAL_VERSION
from bsc.eval.interp.judges.facts import JudgeFacts
from bsc.eval.interp.scores import Interpretability, SampledMean, SampledMeans
from bsc.eval.report.coders import read_coders
from bsc.eval.report.export import write_figures
from bsc.eval.report.interp import Scored, ScoreSet
from bsc.eval.report.interp_plots import scores
from bsc.eval.report.report import render_report, write_report
from bsc.records import write_record
from bsc.train.run import Run
from tests.raw import raw

HOSTILE = "</div><script>alert(1)</script><img src=x onerror=alert(2)>&\"'\u202e\u2028\x00\x1b[2J"


class Page(HTMLParser):
    """Collects tags, attributes that load something, and checks that tags are balanced."""

    VOID = ("meta", "link", "br", "img", "path", "use", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.hrefs: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name == "href" and tag == "a":
                self.hrefs.append(value or "")
            if name in ("src", "srcset", "action", "data") or name.startswith("on"):
                self.loads.append(f"{tag} {name}={value}")
            if name in ("href", "xlink:href") and not (value or "").startswith(("#", "data:")):
                self.loads.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_loads_nothing_and_runs_only_its_own_script(evaluated: Run) -> None:
    text = render_report([evaluated])
    page = Page(text)
    assert page.loads == [] and page.open == []
    assert not re.search(r"url\((?!#)", text) and "@import" not in text
    # The policy allows one script, by its hash, and no request.
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert "default-src 'none'" in policy and "unsafe-inline" not in policy.split("script-src")[1]
    script = re.findall(r"<script>(.*?)</script>", text, flags=re.S)
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert len(script) == page.tags.count("script") == 1 and f"'sha256-{digest}'" in policy
    for name in evaluated.coder_names():
        assert name in text
    assert len(text.encode()) < 4_000_000


def test_every_number_is_one_click_from_its_definition_and_every_figure_has_words(
    evaluated: Run,
) -> None:
    text = render_report([evaluated])
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert {h for h in page.hrefs if h.startswith("#")} <= {f"#{i}" for i in page.ids}
    assert len([h for h in page.hrefs if h.startswith("#def-")]) > 20
    assert all(f"#coder-{i}" in page.hrefs for i in range(1, 9))
    svgs = re.findall(r"<svg [^>]*>", text)
    assert len(svgs) == page.tags.count("figure") == 12
    for svg in svgs:
        assert 'role="img"' in svg
        (alt,) = re.findall(r'aria-label="([^"]*)"', svg)
        assert re.search(r"\d\.\d|\d latents", alt), alt  # the numbers are in it


def test_one_seed_and_no_evaluated_seed_pairs_are_said(evaluated: Run) -> None:
    text = render_report([evaluated])
    assert "One seed only (0)" in text
    assert "differ in their seed alone, so how far latents depend on it is not known" in text


def test_the_same_inputs_give_the_same_bytes(evaluated: Run) -> None:
    assert render_report([evaluated]) == render_report([evaluated])


def test_text_of_the_corpus_and_of_configs_is_escaped(evaluated: Run, tmp_path: Path) -> None:
    copy = Run(Path(shutil.copytree(evaluated.folder, tmp_path / "hostile")))
    path = copy.eval_folder / "examples.json"
    examples = raw(copy.eval_folder / "examples.json")["coders"]
    for latents in examples.values():
        for latent in latents:
            text = [[HOSTILE, 1.0, True], [HOSTILE, None, False]]
            latent["contexts"] = [{"stratum": 1, "text": text}]
    write_record(path, {"version": EVAL_VERSION, "coders": examples})
    config = raw(copy.config_path)
    config["model"]["name"] = HOSTILE
    write_record(copy.config_path, config)
    html = render_report([copy])
    page = Page(html)
    assert page.loads == [] and page.tags.count("script") == 1 and "img" not in page.tags
    assert not set(html) & set("\u202e\u2028\x00\x1b") and "\u27e8U+202E\u27e9" in html
    assert page.open == []


def test_changed_files_get_one_message(evaluated: Run, tmp_path: Path) -> None:
    copy = Run(Path(shutil.copytree(evaluated.folder, tmp_path / "changed")))
    copy.metrics_path.write_text('{"odd": 1}\n')
    with pytest.raises(StoreError, match=r"metrics.jsonl: not of the form .*KeyError\('step'\)"):
        render_report([copy])


def test_coders_without_a_living_latent_have_a_page(evaluated: Run, tmp_path: Path) -> None:
    copy = Run(Path(shutil.copytree(evaluated.folder, tmp_path / "dead")))
    found = raw(copy.eval_path)
    for figures in found["coders"].values():
        histogram = figures["log10_rate_histogram"]
        histogram["counts"] = [0] * len(histogram["counts"])
    write_record(copy.eval_path, found)
    assert Page(render_report([copy])).open == []


def test_several_runs_share_a_page_also_with_one_name(evaluated: Run, tmp_path: Path) -> None:
    other = Run(Path(shutil.copytree(evaluated.folder, tmp_path / "other")))
    twin = Run(Path(shutil.copytree(evaluated.folder, tmp_path / "small")))
    text = write_report([evaluated, other, twin], tmp_path / "all.html").read_text()
    assert "24 sparse coders" in text and f"{tmp_path.name}/small" in text
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert {h for h in page.hrefs if h.startswith("#")} <= {f"#{i}" for i in page.ids}


def test_hundreds_of_coders_make_a_page_of_a_few_megabytes(
    evaluated_copy: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is shown of each coder shrinks with their number, but no coder goes missing."""
    few = render_report([evaluated_copy])
    monkeypatch.setattr("bsc.eval.report.report.ALL_LATENTS", 16)
    monkeypatch.setattr("bsc.eval.report.report.ALL_ULTRA", 32)
    text = render_report([evaluated_copy])
    assert len(text) < 0.75 * len(few)
    latents = [i for i in Page(text).ids if "-latent-" in i]
    assert len(latents) == 16 and {i.split("-latent")[0] for i in latents} == {
        f"coder-{n}" for n in range(1, 9)
    }


def test_a_run_that_is_not_evaluated_says_what_to_do(run: Run) -> None:
    with pytest.raises(StoreError, match=f"bsc eval {run.folder}"):
        render_report([run])


def test_an_evaluation_that_was_changed_gets_one_message(evaluated_copy: Run) -> None:
    found = raw(evaluated_copy.eval_path)
    for figures in found["coders"].values():
        del figures["bits"]
    write_record(evaluated_copy.eval_path, found)
    with pytest.raises(StoreError, match="not of the form that it should have"):
        render_report([evaluated_copy])


def test_a_run_without_ablations_and_probing_has_a_page(evaluated_copy: Run) -> None:
    found = raw(evaluated_copy.eval_path)
    found["probing"], found["stability"] = {}, []
    for figures in found["coders"].values():
        del figures["ablation"]
        figures["ultra"] = []
        for key in [k for k in figures if k.endswith("interval")]:
            figures[key] = None  # too few contexts for one
    write_record(evaluated_copy.eval_path, found)
    text = render_report([evaluated_copy])
    assert Page(text).open == [] and "no interval" in text
    assert "Ablations were not run" in text and "No texts were probed" in text


def test_figures_and_numbers_for_a_paper(evaluated: Run, tmp_path: Path) -> None:
    first, second = (write_figures([evaluated], tmp_path / name) for name in ("a", "b"))
    files = sorted(p.name for p in first.iterdir())
    assert files == sorted(p.name for p in second.iterdir())
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    stems = {Path(n).stem for n in files if n.endswith(".pdf")}
    assert {"delta-ce-k", "fvu-bits", "firing", "ablation", "probing-0-stdlib"} <= stems
    assert stems == {Path(n).stem for n in files if n.endswith(".svg")}
    with (first / "coders.csv").open() as file:
        lines = {line["name"]: line for line in csv.DictReader(file)}
    for name, figures in raw(evaluated.eval_path)["coders"].items():
        assert float(lines[name]["fvu"]) == figures["fvu"]
        assert float(lines[name]["delta_ce_low"]) == figures["delta_ce_interval"][0]
    tables = json.loads((first / "figures.json").read_text())
    assert {len(tables["coders"]), len(tables["stability"])} == {8, 4}
    assert len(tables["probing"]) == (8 + 2) * 12 + 2  # and all channels of each side


def shown(page: str) -> str:
    """The text of a page, without style, script and plots."""
    page = re.sub(r"<(style|script|svg)\b.*?</\1>", "", page, flags=re.S)
    return re.sub(r"<[^>]*>", " ", page)


def test_percentages_are_written_in_one_way(evaluated: Run) -> None:
    text = shown(render_report([evaluated]))
    assert re.search(r"\d %", text) and not re.findall(r"\S*\d%", text)
    # And no piece of code or template has a way of its own.
    root = Path(__file__).parent.parent.parent
    for folder in ("bsc", "cache", "train", "eval"):
        for path in [*(root / folder).rglob("*.py"), *(root / folder).rglob("*.j2")]:
            code = path.read_text()
            assert not re.search(r":[.\d]*%[}\"']", code), path
            assert not re.search(r"\}\} ?%", code), path


def test_an_interval_has_the_unit_of_its_figure(evaluated_copy: Run) -> None:
    found = raw(evaluated_copy.eval_path)
    for figures in found["coders"].values():
        figures |= {"delta_top1": -0.00935, "delta_top1_interval": [-0.0129, -0.0051]}
    write_record(evaluated_copy.eval_path, found)
    assert "-0.935 % (-1.290 to -0.510 %)" in " ".join(
        shown(render_report([evaluated_copy])).split()
    )


def test_the_caption_of_the_ablations_speaks_of_the_bars_that_there_are(
    evaluated_copy: Run,
) -> None:
    found = raw(evaluated_copy.eval_path)
    for interval, says in (([0.1, 0.2], "Bars are 95 % intervals"), (None, "There are no interv")):
        for figures in found["coders"].values():
            for one in figures["ablation"]["bins"]:
                one["delta_ce_interval"] = interval
        write_record(evaluated_copy.eval_path, found)
        text = shown(render_report([evaluated_copy]))
        of_documents = "Bars are 95 % intervals over documents" in text
        assert says in text and of_documents == (interval is not None)
    assert "recovered, mean ablation" in " ".join(text.split())


def test_scores_of_a_single_k_stand_beside_each_other_with_their_names(evaluated: Run) -> None:
    rows = [r for r in read_coders([evaluated]) if r.k == 8]
    assert {r.code for r in rows} == {"binary", "continuous"}
    mean = SampledMean(mean=0.7, interval=[0.6, 0.8], latents=9, sd=0.1, needed=9)
    means = SampledMeans(unweighted=mean, weighted=mean)
    one = ScoreSet("detection", 0.5, {r.name: means for r in rows})
    judge = JudgeFacts(model="m", simulated=False)
    result = Interpretability.model_construct(judge=judge)
    scored = Scored(rows[0].run, "m", "interp-0-0", result, [one], [])
    (axis,) = scores(scored, rows).figure.axes
    names = [label.get_text() for label in axis.get_xticklabels()]
    assert names == [
        f"{c}\n{d}" for d in ("unweighted", "weighted") for c in ("binary", "continuous")
    ]
    assert axis.get_xlabel() == "k = 8" and axis.get_xscale() == "linear"
    marks = sorted(x for line in axis.lines for x in np.atleast_1d(line.get_xdata()).tolist()
                   if line.get_marker() in ("o", "s"))  # fmt: skip
    assert marks == [0, 1, 2, 3]
    assert "line" not in scored.caption(rows)
    # It goes by the coders that were scored, not by those of the run.
    several = read_coders([evaluated])
    assert "line" not in scored.caption(several)
    every = one._replace(coders={r.name: means for r in several})
    assert "solid lines" in scored._replace(sets=[every]).caption(several)


def test_what_was_seen_in_training_is_said(evaluated_copy: Run) -> None:
    found = raw(evaluated_copy.eval_path)
    found["overlap"] = {
        "train_rows": 9_000, "rows": 2_000, "seen_rows": 35, "ngram_tokens": 16,
        "run_tokens": 64, "runs": 1_000, "seen_runs": 2,
    }  # fmt: skip
    first = next(iter(found["coders"].values()))
    first |= {"rows_unseen": 1_965, "fvu_unseen": 0.33333, "fvu_unseen_interval": [0.3, 0.4]}
    write_record(evaluated_copy.eval_path, found)
    text = " ".join(shown(render_report([evaluated_copy])).split())
    assert "1.75 % of the held-out rows were seen in training" in text.replace(" ,", ",")
    assert "at most 0.20 % of the held-out runs of 64 tokens stand there" in text
    assert "0.33333 (0.3000 to 0.4000), on 1,965 of" in text
