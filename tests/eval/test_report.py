from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from bsc.cache.models import load_model
from bsc.cache.store import ActivationStore
from bsc.errors import StoreError
from bsc.eval.evaluate import evaluate
from bsc.eval.examples import choose_latents, collect_examples
from bsc.eval.fidelity import measure
from bsc.eval.report.report import render_report, write_report
from bsc.train.run import Run

HOSTILE = "</div><script>alert(1)</script><img src=x onerror=alert(2)>&\"'"


@pytest.fixture(scope="module")
def evaluated(run: Run, store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    copy = Run(Path(shutil.copytree(run.folder, tmp_path_factory.mktemp("evaluated") / "small")))
    evaluate(copy, ce_tokens=512)
    return copy


class Page(HTMLParser):
    """Collects tags, attributes that load something, and checks that tags are balanced."""

    VOID = ("meta", "link", "br", "img", "path", "use", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
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


def test_the_evaluation_has_every_figure_of_every_coder(
    evaluated: Run, store: ActivationStore
) -> None:
    found = evaluated.evaluation()
    assert list(found["coders"]) == sorted(evaluated.coder_names())
    assert found["held_out_rows"] == store.held_out.rows and found["contexts"] == 16
    for name, figures in found["coders"].items():
        low, high = figures["delta_ce_interval"]
        assert low <= figures["delta_ce"] <= high
        assert 0 <= figures["fvu"] < 1.5 and 0 < figures["l0"] <= 8
        assert (evaluated.coder_folder(name) / "firing.safetensors").exists()
    assert found["ablations"]["layers.2.mlp"]["zero"]["delta_ce"] is not None


def test_the_page_needs_no_script_and_loads_nothing(evaluated: Run) -> None:
    text = render_report([evaluated])
    page = Page(text)
    assert page.loads == [] and "script" not in page.tags and page.open == []
    assert not re.search(r"url\((?!#)", text) and "@import" not in text
    assert page.tags.count("svg") == 4
    for name in evaluated.coder_names():
        assert name in text


def test_the_same_inputs_give_the_same_bytes(evaluated: Run) -> None:
    assert render_report([evaluated]) == render_report([evaluated])


def test_text_of_the_corpus_and_of_configs_is_escaped(evaluated: Run, tmp_path: Path) -> None:
    copy = Run(Path(shutil.copytree(evaluated.folder, tmp_path / "hostile")))
    path = copy.folder / "examples.json"
    examples = json.loads(path.read_text())
    for latents in examples.values():
        for latent in latents:
            latent["contexts"] = [[[HOSTILE, 1.0], [HOSTILE, 0.0]]]
    path.write_text(json.dumps(examples))
    config = copy.config()
    config["model"]["name"] = HOSTILE
    copy.config_path.write_text(json.dumps(config))
    page = Page(render_report([copy]))
    assert page.loads == [] and "script" not in page.tags and "img" not in page.tags
    assert page.open == []


def test_changed_files_get_one_message(evaluated: Run, tmp_path: Path) -> None:
    copy = Run(Path(shutil.copytree(evaluated.folder, tmp_path / "changed")))
    copy.metrics_path.write_text('{"odd": 1}\n')
    with pytest.raises(StoreError, match=r"do not fit together \(KeyError\('step'\)\)"):
        render_report([copy])


def test_coders_without_a_living_latent_have_a_page(evaluated: Run, tmp_path: Path) -> None:
    copy = Run(Path(shutil.copytree(evaluated.folder, tmp_path / "dead")))
    found = copy.evaluation()
    for figures in found["coders"].values():
        histogram = figures["log10_rate_histogram"]
        histogram["counts"] = [0] * len(histogram["counts"])
    copy.eval_path.write_text(json.dumps(found))
    assert Page(render_report([copy])).open == []


def test_several_runs_share_a_page(evaluated: Run, tmp_path: Path) -> None:
    other = Run(Path(shutil.copytree(evaluated.folder, tmp_path / "other")))
    out = write_report([evaluated, other], tmp_path / "both.html")
    text = out.read_text()
    assert "other" in text and "16 sparse coders" in text


def test_a_run_that_is_not_evaluated_says_what_to_do(run: Run) -> None:
    with pytest.raises(StoreError, match=f"bsc eval {run.folder}"):
        render_report([run])


def test_examples_mark_the_tokens_where_the_latent_fires(
    run: Run, store: ActivationStore, tiny_model: Path
) -> None:
    name = next(n for n in run.coder_names() if "skip_transcoder-binary-k8" in n)
    coder = run.coder(name)
    counts = measure(coder, store.held_out, "layers.2.mlp").counts
    tokenizer = load_model(str(tiny_model)).tokenizer
    examples = collect_examples(coder, store.held_out, "layers.2.mlp", counts, tokenizer)
    assert examples
    x = torch.cat(
        [store.held_out.tensor("layers.2.mlp/input", i) for i in range(store.held_out.shards)]
    )
    code = coder.encode(x)
    text = [tokenizer.decode([int(i)]) for i in store.held_out.tokens("token_id")]
    for example in examples:
        on = ((code.latent == example["latent"]) & (code.value != 0)).any(1).tolist()
        expected = [(t, float(f)) for t, f in zip(text, on, strict=True)]
        for context in example["contexts"]:
            window = [(t, v) for t, v in context]
            assert any(v for _, v in window)
            n = len(window)
            assert any(expected[i : i + n] == window for i in range(len(expected) - n + 1))


def test_latents_are_chosen_across_the_range_of_rates() -> None:
    counts = torch.tensor([0, 5, 1000, 10, 100, 20, 50])
    assert choose_latents(counts, 3) == [2, 6, 3]
    assert choose_latents(torch.zeros(5), 3) == []
