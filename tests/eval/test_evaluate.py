"""The whole evaluation of a run, and what it leaves behind."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import bsc.eval.evaluate
from bsc.cache.store.store import ActivationStore
from bsc.cli import main
from bsc.errors import StoreError, UserError
from bsc.eval.compare import compare_runs
from bsc.eval.config import EvalConfig
from bsc.eval.evaluate import evaluate
from bsc.eval.passes import setting as setting_module
from bsc.eval.passes.context_pass import CLEAN, joined, pass_over_contexts
from bsc.eval.passes.contexts import contexts_of
from bsc.eval.passes.setting import matching_model, open_setting
from bsc.eval.report.report import render_report
from bsc.eval.show import latent_examples, load_sample
from bsc.records import write_record
from bsc.train.coders.coder import SparseCoder, parameter_shapes
from bsc.train.coders.config import CoderConfig
from bsc.train.config import TrainConfig
from bsc.train.run import Run, claim
from bsc.train.trainer import train_sweep
from tests.cache.synthetic import change_capture
from tests.raw import raw


def test_the_evaluation_has_every_figure_of_every_coder(
    evaluated: Run, store: ActivationStore
) -> None:
    found = raw(evaluated.eval_path)
    assert list(found["coders"]) == sorted(evaluated.coder_names())
    assert found["held_out_rows"] == store.held_out.rows and found["contexts"] == 16
    for name, f in found["coders"].items():
        for figure in ("fvu", "delta_ce", "kl", "delta_top1"):
            low, high = f[f"{figure}_interval"]
            assert low <= f[figure] <= high, (name, figure)
        assert 0 <= f["fvu"] < 1.5 and 0 < f["l0"] <= 8 and f["kl"] > 0
        zero, mean = (found["ablations"]["layers.2.mlp"][k]["delta_ce"] for k in ("zero", "mean"))
        assert f["loss_recovered_zero"] == pytest.approx(1 - f["delta_ce"] / zero)
        assert f["loss_recovered_mean"] == pytest.approx(1 - f["delta_ce"] / mean)
        assert f["bits"] == f["bits_firing"] + f["bits_values"]
        continuous = "continuous" in name
        assert continuous == ("fvu_binarised" in f) == (f["bits_values"] > 0)
        counts = load_file(evaluated.coder_folder(name) / "firing.safetensors")["counts"]
        assert counts.sum() == f["firings"] and (counts == 0).sum() == f["dead"]
        assert len(f["ablation"]["bins"]) and len(f["ablation"]["random"])
        share = sum(b["firing_share"] for b in f["ablation"]["bins"])
        assert share == pytest.approx(1)
        assert [u["rate"] for u in f["ultra"]] == sorted(
            (u["rate"] for u in f["ultra"]), reverse=True
        )
        assert ["delta_ce" in u for u in f["ultra"]] == [i < 1 for i in range(len(f["ultra"]))]
        assert np.isin(load_sample(evaluated, name).latent, np.flatnonzero(counts)).all()
    assert {s["differs"] for s in found["stability"]} == {"code"} and len(found["stability"]) == 4
    for pair in found["stability"]:
        a, b = (found["coders"][pair[k]] for k in ("a", "b"))
        for figure in ("fvu", "delta_ce"):
            difference, (low, high) = pair[f"{figure}_difference"], pair[f"{figure}_interval"]
            assert difference == pytest.approx(a[figure] - b[figure])
            assert low < difference < high
            # Paired, it is known better than the difference of two that are not.
            widths = [np.diff(f[f"{figure}_interval"]).item() for f in (a, b)]
            assert high - low < np.hypot(*widths)
    probed = found["probing"]["stdlib"]
    assert set(probed["coders"]) == set(found["coders"])
    assert set(probed["baselines"]) == {"layers.2.mlp/input", "layers.2.mlp/output"}


def test_an_evaluation_again_takes_what_is_there_and_gives_the_same(
    evaluated_copy: Run, small: EvalConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    before = raw(evaluated_copy.eval_path)
    places = [evaluated_copy.eval_folder / p for p in ("rows/layers.2.mlp", "losses", "ablation")]
    stamps = [(p / "00000.safetensors").stat().st_mtime_ns for p in places]
    evaluate(evaluated_copy, small)
    assert [(p / "00000.safetensors").stat().st_mtime_ns for p in places] == stamps
    after = raw(evaluated_copy.eval_path)
    assert {k: v for k, v in after.items() if k != "at"} == {
        k: v for k, v in before.items() if k != "at"
    }


def test_an_interrupted_evaluation_leaves_the_figures_before_it(
    evaluated_copy: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = evaluated_copy.eval_path.read_text()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bsc.eval.evaluate, "probing_figures", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(evaluated_copy, EvalConfig(ce_tokens=64, ablation_bins=0, ultra_ablations=0))
    assert evaluated_copy.eval_path.read_text() == before


def test_coders_of_several_hookpoints_are_spliced_together(
    store_path: Path, tmp_path: Path
) -> None:
    run, _ = train_sweep(
        TrainConfig(
            store=store_path, runs=tmp_path, tokens=3_000, batch_rows=256,
            coders=({"hookpoint": ["layers.0.mlp", "layers.2.mlp"], "k": 4, "n_latents": 32},),
        )
    )  # fmt: skip
    found = evaluate(run, EvalConfig(ce_tokens=512, ablation_bins=0, ultra_ablations=0, probes=()))
    ((label, together),) = found["together"].items()
    assert together["coders"] == [f"{h}/{label}" for h in ("layers.0.mlp", "layers.2.mlp")]
    costs = [found["coders"][n]["delta_ce"] for n in together["coders"]]
    assert together["delta_ce"] not in costs and together["kl"] > 0
    assert set(found["ablations"]) == {"layers.0.mlp", "layers.2.mlp"}
    assert found["probing"] == {} and found["stability"] == []


def test_a_latent_that_never_fires_is_dead_and_shown_nowhere(run: Run, tmp_path: Path) -> None:
    copy = Run(Path(shutil.copytree(run.folder, tmp_path / "run")))
    name = copy.coder_names()[0]
    coder = copy.coder(name)
    coder.b_enc[5] = -1e6
    coder.save(copy.coder_folder(name))
    config = EvalConfig(ce_tokens=64, ablation_bins=2, ablation_tokens=64, probes=())
    found = evaluate(copy, config)["coders"][name]
    assert found["dead"] >= 1 and found["dead_rate_bound"] < 0.01
    silent = latent_examples(copy, name, 5)
    assert silent["contexts"] == [] and silent["firings"] == 0
    assert all(e["latent"] != 5 for e in raw(copy.eval_folder / "examples.json")["coders"][name])


def test_a_run_whose_store_is_gone_says_what_still_works(
    run: Run, tmp_path: Path, small: EvalConfig
) -> None:
    copy = Run(Path(shutil.copytree(run.folder, tmp_path / "run")))
    config = raw(copy.config_path)
    config["store"] = str(tmp_path / "gone")
    write_record(copy.config_path, config)
    says = r"--store, or .* with --on\. `bsc report` and `bsc compare` work without"
    with pytest.raises(StoreError, match=says):
        evaluate(copy, small)
    assert not copy.eval_folder.exists()


def test_a_coder_of_another_model_is_refused(
    run: Run, store: ActivationStore, tmp_path: Path, small: EvalConfig
) -> None:
    copy = Run(Path(shutil.copytree(run.folder, tmp_path / "run")))
    from bsc.train.coders.config import CoderConfig
    from tests.eval.planted import zeros

    name = copy.coder_names()[0]
    other = zeros(CoderConfig(site="sae", k=2, n_latents=8, d_in=48, d_out=48))
    other.about = copy.coder(name).about
    other.save(copy.coder_folder(name))
    with pytest.raises(StoreError, match=r"maps 48 channels to 48.*a coder of another model"):
        evaluate(copy, small)


def test_codes_that_the_disk_cannot_hold_are_not_begun(
    run: Run, tmp_path: Path, small: EvalConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Run(Path(shutil.copytree(run.folder, tmp_path / "run")))
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match=r"but 1\.0 kB are free\. Evaluate on fewer rows"):
        evaluate(copy, small)
    assert not copy.eval_path.exists()


def test_coders_that_a_gpu_cannot_hold_are_not_loaded(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setting_module, "available_bytes", lambda _: 10_000)
    said = r"its 8 coders take \d+\.\d kB, but 10\.0 kB may be used on cuda.* --device cpu"
    with pytest.raises(UserError, match=said):
        setting_module._check_memory(run, torch.device("cuda"))
    setting_module._check_memory(run, torch.device("cpu"))  # there they are mapped


def test_room_is_asked_for_what_thresholds_let_through(store: ActivationStore) -> None:
    """A coder of another tool has k = 1, and as many latents on as are above their thresholds."""
    hook = store.hookpoint("layers.2.mlp")
    config = CoderConfig(site="sae", code="continuous", select="batch_topk", k=1, n_latents=64,
                         d_in=hook.d_out, d_out=hook.d_out)  # fmt: skip
    torch.manual_seed(0)
    tensors = {n: torch.randn(shape) for n, shape in parameter_shapes(config).items()}
    tensors["select_threshold"] = torch.zeros(1)
    coder = SparseCoder(config, tensors)
    setting: Any = SimpleNamespace(
        coders={"a": coder}, hookpoint=lambda name: hook.name, split=store.held_out
    )
    assert 20 < bsc.eval.evaluate._on(setting, "a") < 44


def test_wrong_settings_are_named_before_anything_is_read(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for flags, says in (
        (["--ce-tokens", "0"], "bsc eval: --ce-tokens: should be at least 1"),
        (["--probe", str(tmp_path / "no.csv")], "no such file"),
        (["--rows", "0"], "bsc eval: --rows: should be at least 1"),
    ):
        with pytest.raises(SystemExit) as done:
            main(["eval", str(run.folder), *flags])
        assert done.value.code == 2 and says in capsys.readouterr().err


FAST = EvalConfig(ce_tokens=512, ablation_bins=0, ultra_ablations=0, probes=())


def copied(run: Run, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(run.folder, tmp_path / "run")))


def without_date(run: Run) -> dict[str, Any]:
    return {k: v for k, v in raw(run.eval_path).items() if k != "at"}


def test_figures_do_not_depend_on_what_was_evaluated_before(run: Run, tmp_path: Path) -> None:
    """Fewer rows give other bins and other frequent latents: nothing of them may be taken again."""
    config = EvalConfig(ce_tokens=512, ablation_bins=3, ablation_tokens=320, probes=())
    once, twice = (copied(run, tmp_path / name) for name in ("once", "twice"))
    evaluate(once, config)
    evaluate(twice, config.model_copy(update={"rows": 96}))
    assert raw(twice.eval_path)["coders"] != raw(once.eval_path)["coders"]
    evaluate(twice, config)
    assert without_date(twice) == without_date(once)


def test_codes_that_were_removed_are_made_again(evaluated_copy: Run, small: EvalConfig) -> None:
    before = without_date(evaluated_copy)
    shutil.rmtree(evaluated_copy.eval_folder / "codes")
    evaluate(evaluated_copy, small)
    assert without_date(evaluated_copy) == before


def test_a_finished_evaluation_needs_no_room(
    evaluated_copy: Run, small: EvalConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    evaluate(evaluated_copy, small)


def test_two_evaluations_of_a_run_do_not_mix(evaluated_copy: Run, small: EvalConfig) -> None:
    with claim(evaluated_copy.folder), pytest.raises(UserError, match="in use"):
        evaluate(evaluated_copy, small)


def test_a_coder_that_gives_no_numbers_is_left_out_and_named(run: Run, tmp_path: Path) -> None:
    copy = copied(run, tmp_path)
    bad = copy.coder_names()[0]
    coder = copy.coder(bad)
    coder.b_dec.fill_(3e38)
    coder.save(copy.coder_folder(bad))
    found = evaluate(copy, FAST)
    assert found["left_out"] == [bad] and len(found["coders"]) == 7
    page = render_report([copy])
    assert f"non-finite in training: {bad}" in page


def test_a_coder_with_a_nan_or_a_changed_byte_stops_the_evaluation_at_once(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its figures would be others, or the end of all the work a traceback."""
    copy = copied(run, tmp_path)
    name = copy.coder_names()[3]
    weights = copy.coder_folder(name) / "coder.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-100] ^= 64
    weights.write_bytes(raw)
    with pytest.raises(StoreError, match=rf"{name}/coder.safetensors: damaged or exchanged"):
        evaluate(copy, FAST)
    coder = run.coder(name)
    coder.W_enc[1, 2] = float("nan")
    coder.save(copy.coder_folder(name))
    with pytest.raises(StoreError, match=r"encoder.weight hold values that are not finite"):
        evaluate(copy, FAST)
    assert not copy.eval_path.exists()


@pytest.mark.parametrize("file", ["documents.safetensors", "samples"])
def test_sums_and_samples_that_were_changed_are_not_read(
    evaluated: Run, tmp_path: Path, file: str
) -> None:
    copy = Run(Path(shutil.copytree(evaluated.folder, tmp_path / "small")))
    name = copy.coder_names()[0]
    path = copy.eval_folder / file
    if path.is_dir():
        path = path / f"{name}.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    read = partial(load_sample, copy, name) if file == "samples" else partial(
        compare_runs, copy, evaluated
    )  # fmt: skip
    with pytest.raises(StoreError, match="its content does not have the hash"):
        read()


def test_a_run_without_a_coder_that_can_be_evaluated_has_figures_but_no_report(
    run: Run, evaluated: Run, tmp_path: Path
) -> None:
    copy = copied(run, tmp_path)
    for name in copy.coder_names():
        coder = copy.coder(name)
        coder.about["frozen_at_step"] = 3
        coder.save(copy.coder_folder(name))
    found = evaluate(copy, FAST)
    assert len(found["left_out"]) == 8 and found["coders"] == {}
    with pytest.raises(UserError, match="needs at least one coder"):
        render_report([copy])
    page = render_report([evaluated, copy])
    assert "8 sparse coders" in page and "measured on the same rows" not in page


def test_rows_of_special_tokens_stay_as_they_are_in_a_splice(
    store_path: Path, tmp_path: Path
) -> None:
    """Of coders that were not trained on them, in the rows and in the losses alike."""
    base = {"hookpoint": "layers.2.mlp", "k": 4, "n_latents": 64}
    run, _ = train_sweep(
        TrainConfig(
            store=store_path, runs=tmp_path, tokens=6_000, batch_rows=256, coders=(base,),
            without_special_tokens=True,
        )
    )  # fmt: skip
    found = evaluate(run, FAST)
    (figures,) = found["coders"].values()
    split = ActivationStore(store_path).held_out
    special = split.tokens("token_id") == 0
    assert special.sum() > 20 and figures["rows"] == split.rows - special.sum()
    assert found["held_out_rows"] == figures["rows"]
    # A coder that gives nonsense for special tokens alone costs nothing.
    name = run.coder_names()[0]
    setting = open_setting(run, store=None, model=None, device="cpu")
    contexts = contexts_of(setting.store, 512, setting.separation)
    first = contexts.token_id == 0

    def nonsense(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        here = torch.from_numpy(first[: len(y) // 32].ravel())
        return torch.where(here[: len(y)].unsqueeze(1), 1e3, y)

    for without, free in ((setting.without_tokens, True), ((), False)):
        sums = joined(
            pass_over_contexts(
                setting.lm, contexts, {name: {"layers.2.mlp": nonsense}}, without_tokens=without
            ),
            contexts.documents,
        )
        assert np.array_equal(sums[name].nats, sums[CLEAN].nats) == free


def test_a_ring_whose_first_shards_are_gone_is_evaluated(
    run: Run, store_path: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(store_path, tmp_path / "acts"))
    store_id = change_capture(root, ring=4)
    gone = [p for p in root.glob("data.zarr/**/c/0*") if "held_out" not in str(p)]
    assert len(gone) >= 4
    for path in gone:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(StoreError, match="missing"):
        ActivationStore(root).train.shard("layers.2.mlp/input", 0)
    copy = copied(run, tmp_path)
    write_record(copy.config_path, raw(copy.config_path) | {"store_id": store_id})
    found = evaluate(copy, FAST, store=root)
    assert sum("fvu_binarised" in f for f in found["coders"].values()) == 4


def test_a_copy_of_a_hub_model_is_known_by_its_rows(
    store_path: Path, tiny_model: Path, tmp_path: Path
) -> None:
    store = ActivationStore(store_path)
    store.attributes["model"] |= {"name": "owner/model", "revision": "a" * 40,
                                  "weights_sha256": None}  # fmt: skip
    lm = matching_model(store, str(tiny_model), torch.device("cpu"))
    assert lm.name == str(tiny_model)
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1.3)
    model.save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, other / name)
    with pytest.raises(StoreError, match=r"gives other rows at layers\.2\.mlp"):
        matching_model(store, str(other), torch.device("cpu"))
