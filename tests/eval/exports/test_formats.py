"""What each format holds is exact by the other tool's formula; what it does not hold is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bsc.cli import main
from bsc.errors import UserError
from bsc.eval.exports import circuit_tracer, export
from bsc.eval.exports.card import _reads
from bsc.eval.exports.weights import (
    Origin,
    check_written,
    linear_threshold,
    strict_threshold,
    unit_rows,
)
from bsc.train.coders.coder import SparseCoder
from bsc.train.coders.config import CoderConfig
from bsc.train.run import Run
from tests.eval.exports.kinds import HELD, K, kinds, random_coder, rows, written
from tests.eval.interp.command import main_ok

KINDS = {f"{site} {name}": (site, name, config) for site, name, config in kinds()}


def refusal(format_: str, config: CoderConfig) -> str | None:
    if format_ == "circuit-tracer":
        return circuit_tracer.refusal(config)
    return export._FORMATS[format_].refusal(config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format_", HELD)
def test_a_format_holds_a_kind_exactly_or_says_why_not(
    format_: str, kind: str, tmp_path: Path
) -> None:
    site, name, config = KINDS[kind]
    reason = refusal(format_, config)
    if (site, name) not in HELD[format_]:
        assert reason and not reason.endswith("."), reason
        return
    assert reason is None
    coder = random_coder(config)
    found = check_written(coder, written(format_, coder, tmp_path / "out"), rows())
    assert (found.rows, found.near_ties) == (300, 0)
    assert found.largest_code > 0 and found.largest_reconstruction > 1
    assert found.reconstruction <= 1e-5 * found.largest_reconstruction
    # Of a kind that the check would not see: latents that are off, and others that are not.
    code = coder.encode(rows())
    assert int((code.value != 0).sum()) > 0
    if config.select != "batch_topk":
        assert int((code.value == 0).sum()) > 0, "k positive latents in every row tell little"


def test_the_table_in_the_docs_is_what_is_tested() -> None:
    text = (Path(__file__).parents[3] / "docs" / "exchange.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if " | exact" in line]
    (head,) = (line.strip("| ").split(" | ") for line in text.splitlines() if "| coder |" in line)
    found: dict[str, set[tuple[str, str]]] = {name: set() for name in head[1:]}
    for label, *cells in lines:
        site, name = label.split(", ", 1)
        for format_, cell in zip(found, cells, strict=True):
            assert cell in ("exact", "refused")
            if cell == "exact":
                found[format_].add((site, name))
    assert found == HELD


def test_widths_that_differ_are_held_by_saelens_alone() -> None:
    config = CoderConfig(
        site="transcoder", code="continuous", select="batch_topk", k=4, n_latents=32, d_in=8,
        d_out=12,
    )  # fmt: skip
    assert refusal("saelens", config) is None
    wide = config.model_copy(update={"select": "topk"})
    assert "one width" in str(refusal("sparsify", wide))
    assert "one width" in str(refusal("circuit-tracer", config))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("encoder.weight", lambda t: t.flip(0)),
        ("encoder.bias", lambda t: t + 1e-2),
        ("W_dec", lambda t: t * 1.001),
        ("b_dec", lambda t: t + 1e-2),
        ("W_skip", lambda t: t.T),
    ],
)
def test_a_file_that_computes_something_else_is_seen(
    name: str, change: Any, tmp_path: Path
) -> None:
    coder = random_coder(KINDS["skip_transcoder top-k"][2])
    written("sparsify", coder, tmp_path / "out")
    path = tmp_path / "out" / "sae.safetensors"
    tensors = load_file(path)
    save_file(tensors | {name: change(tensors[name]).contiguous()}, path)
    with pytest.raises(UserError, match=r"on in the coder or in what|differ by"):
        check_written(coder, export._FORMATS["sparsify"].reference(tmp_path / "out"), rows())


def test_another_k_is_seen(tmp_path: Path) -> None:
    coder = random_coder(KINDS["sae top-k"][2])
    written("sparsify", coder, tmp_path / "out")
    path = tmp_path / "out" / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"k": K + 1}))
    with pytest.raises(UserError, match="but not in both"):
        check_written(coder, export._FORMATS["sparsify"].reference(tmp_path / "out"), rows())


def test_thresholds_that_are_compared_strictly_select_the_same() -> None:
    t = torch.tensor([0.0, 1.0, -2.5, 1e-30, 3e38])
    margins = torch.cat([t, strict_threshold(t), linear_threshold(t)]).unsqueeze(1)
    assert torch.equal(margins >= t, margins > strict_threshold(t))
    assert torch.equal(linear_threshold(strict_threshold(t)), t)


def test_unit_rows_are_the_same_function() -> None:
    config = KINDS["sae batch top-k"][2]
    coder = random_coder(config)
    tensors = dict(coder.tensors)
    with pytest.raises(UserError, match=r"rows have lengths from .* decoder_norm = 'unit'"):
        unit_rows(coder)
    tensors["W_dec"] = 1.7 * coder.W_dec / coder.W_dec.norm(dim=1, keepdim=True)
    coder = SparseCoder(config, tensors)
    unit, length = unit_rows(coder)
    assert length == pytest.approx(1.7, rel=1e-5)
    torch.testing.assert_close(unit.W_dec.norm(dim=1), torch.ones(config.n_latents))
    a, b = coder.encode(rows()), unit.encode(rows())
    torch.testing.assert_close(
        coder.decode(a, rows()), unit.decode(b, rows()), rtol=1e-4, atol=1e-4
    )
    dense = [torch.zeros(300, config.n_latents).scatter_(1, c.latent, c.value) for c in (a, b)]
    torch.testing.assert_close(dense[0] * length, dense[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="codes other than 0 and 1"):
        unit_rows(random_coder(KINDS["sae binary"][2]))


def test_the_card_says_what_coders_read(run: Run) -> None:
    config = run.config()
    plain = " ".join(_reads(config))
    assert "from its input, which is what the module itself reads (width" in plain
    assert "left out of training" not in plain
    one = config.coders[0].model_copy(update={"hookpoint": "layers.2.norm@layers.2.mlp"})
    coder = one.coder.model_copy(update={"site": "transcoder"})
    changed = {"coders": [one.model_copy(update={"coder": coder})], "without_tokens": [9, 0]}
    words = " ".join(_reads(config.model_copy(update=changed)))
    assert "give the output of `layers.2.mlp` from the input of `layers.2.norm` (width" in words
    assert "Rows of the tokens 0, 9 were left out of training and of every figure." in words


def test_circuit_tracer_needs_every_layer_once() -> None:
    assert circuit_tracer.layers_of({"b": "layers.1.mlp", "a": "h.0.mlp"}) == {0: "a", 1: "b"}
    for hooks, message in (
        ({"a": "layers.2.mlp"}, "none is named for layer 0, 1"),
        ({"a": "layers.0.mlp", "b": "layers.0.mlp"}, "a and b are both of layer 0"),
        ({"a": "layers.0"}, "replaces MLPs; this one is at layers.0"),
        ({"a": "layers.0.ln2@layers.0.mlp"}, "this one is at layers.0.ln2@layers.0.mlp"),
        ({"a": "layers.1.attn@layers.0.mlp"}, "this one is at layers.1.attn@layers.0.mlp"),
    ):
        with pytest.raises(UserError, match=message):
            circuit_tracer.layers_of(hooks)


# the command


def test_a_run_is_exported_checked_and_said(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run.coder_names()
    continuous = [n for n in names if run.coder(n).config.code == "continuous"]
    out = tmp_path / "out"
    main_ok("export", run.folder, "*continuous*", "--format", "sparsify", "--out", out)
    said = capsys.readouterr().out.split()
    found = json.loads((out / "export.json").read_text())
    assert set(found["coders"]) == set(continuous) and len(said) == len(continuous)
    for one in found["coders"].values():
        assert one["checked"]["rows"] > 1000 and one["checked"]["largest_reconstruction"] > 0
        assert (out / one["place"] / "cfg.json").exists()
    one_out = tmp_path / "one"
    main_ok("export", run.folder, continuous[0], "--format", "sparsify", "--out", one_out)
    hook = run.config().coder(continuous[0]).hookpoint
    assert {p.name for p in one_out.iterdir()} == {hook, "export.json"}  # as load_many has it


def test_a_coder_that_diverged_is_not_exported(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Run(Path(shutil.copytree(run.folder, tmp_path / "run")))
    names = [n for n in copy.coder_names() if copy.coder(n).config.code == "continuous"]
    coder = copy.coder(names[0])
    coder.about["frozen_at_step"] = 3
    coder.save(copy.coder_folder(names[0]))
    found = export.export_coders(copy, ["*continuous*"], "sparsify", tmp_path / "out")
    assert set(found["coders"]) == set(names[1:])
    assert f"left out, for they turned non-finite in training: {names[0]}" in " ".join(
        capsys.readouterr().err.split()
    )
    with pytest.raises(UserError, match="every chosen coder turned non-finite"):
        export.export_coders(copy, [names[0]], "sparsify", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_cannot_be_held_is_refused_before_anything_is_written(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["*", "--format", "sparsify"], "no binary latents.*--format sparsify-binary"),
        (["*", "--format", "saelens"], "no binary latents"),
        (["nothing*", "--format", "sparsify"], "no coder fits 'nothing\\*'"),
        (["*", "--format", "spasify"], "did you mean 'sparsify'"),
        (["*", "--format", "delphi"], "name one, without --unit-rows"),
    ):
        with pytest.raises(SystemExit) as done:
            main(["export", str(run.folder), *arguments, "--out", str(tmp_path / "out")])
        assert done.value.code == 2
        error = capsys.readouterr().err
        assert re.search(message, error, re.DOTALL), error
    assert not (tmp_path / "out").exists()


def test_what_does_not_compute_the_same_is_removed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    format_ = export._FORMATS["sparsify-binary"]

    def wrong(coder: SparseCoder, folder: Path, origin: Origin) -> None:
        tensors = coder.tensors | {"W_dec": 1.01 * coder.W_dec}
        format_.write(SparseCoder(coder.config, tensors), folder, origin)

    broken = {"sparsify-binary": format_._replace(write=wrong)}
    monkeypatch.setattr(export, "_FORMATS", broken)
    name = next(n for n in run.coder_names() if "binary" in n)
    with pytest.raises(UserError, match="does not compute the same, so nothing is kept"):
        export.export_coders(run, [name], "sparsify-binary", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    export.export_coders(run, [name], "sparsify-binary", tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
