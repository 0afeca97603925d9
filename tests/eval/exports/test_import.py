"""Coders of other tools come in as the same functions, and what is hostile or foreign does not."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bsc.cache.store.store import ActivationStore
from bsc.cli import main
from bsc.errors import UserError
from bsc.eval.evaluation import read_evaluation
from bsc.eval.exports import circuit_tracer, dictionary_learning, export, saelens
from bsc.eval.exports.export import export_coders
from bsc.eval.exports.importing import import_coders
from bsc.eval.exports.weights import check_written
from bsc.train.coders.coder import SparseCoder
from bsc.train.coders.config import CoderConfig
from bsc.train.run import Run
from tests.eval.exports.kinds import HELD, LATENTS, WIDTH, kinds, random_coder, rows, written
from tests.eval.interp.command import main_ok

HELD_KINDS = {
    f"{format_}: {site} {name}": (format_, config)
    for format_, held in HELD.items()
    for site, name, config in kinds()
    if (site, name) in held
}


@pytest.mark.parametrize("case", HELD_KINDS)
def test_what_was_written_comes_back_the_same(case: str, tmp_path: Path) -> None:
    format_, config = HELD_KINDS[case]
    coder = random_coder(config)
    written(format_, coder, tmp_path / "out")
    if format_ == "circuit-tracer":
        found = circuit_tracer.read(tmp_path / "out", 0)
    else:
        found = export._FORMATS[format_].read(tmp_path / "out")
    assert set(found.coder.tensors) == set(coder.tensors)
    for name, t in coder.tensors.items():
        assert torch.equal(found.coder.tensors[name], t), name
    a, b = coder.encode(rows()), found.coder.encode(rows())
    assert torch.equal(a.latent, b.latent) and torch.equal(a.value, b.value)
    assert torch.equal(coder.decode(a, rows()), found.coder.decode(b, rows()))


def sae_files(folder: Path, architecture: str, **changes: Any) -> Path:
    """An SAE of SAELens with random weights; changes go to cfg.json, tensors to the weights."""
    g = torch.Generator().manual_seed(3)
    tensors = {
        "W_enc": torch.randn(WIDTH, LATENTS, generator=g),
        "b_enc": torch.randn(LATENTS, generator=g),
        "W_dec": torch.randn(LATENTS, WIDTH, generator=g), "b_dec": torch.randn(WIDTH, generator=g),
    }  # fmt: skip
    for name in [n for n in changes if isinstance(changes[n], torch.Tensor)]:
        tensors[name] = changes.pop(name)
    config = {"architecture": architecture, "apply_b_dec_to_input": True} | changes
    folder.mkdir(parents=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("standard", {}),
        ("standard", {"apply_b_dec_to_input": False}),
        ("topk", {"k": 5}),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
        ("jumprelu", {"threshold": torch.full((LATENTS,), 2.0)}),
        ("jumprelu", {"threshold": torch.linspace(-1, 6, LATENTS)}),
        ("transcoder", {"apply_b_dec_to_input": False}),
        ("skip_transcoder", {"apply_b_dec_to_input": False, "W_skip": torch.eye(WIDTH)}),
        ("jumprelu_skip_transcoder",
         {"apply_b_dec_to_input": False, "W_skip": torch.randn(WIDTH, WIDTH).T.contiguous(),
          "threshold": torch.linspace(0, 6, LATENTS)}),
    ],
)  # fmt: skip
def test_saelens_relu_jumprelu_and_topk(
    architecture: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = sae_files(tmp_path / "sae", architecture, **changes)
    coder = saelens.read(folder).coder
    found = check_written(coder, saelens.reference(folder), rows())
    assert found.largest_code > 1 and found.near_ties == 0
    coder.save(tmp_path / "ours")
    again = SparseCoder.load(tmp_path / "ours")  # thresholds for each latent, too
    assert torch.equal(again.encode(rows()).value, coder.encode(rows()).value)


def dictionary(folder: Path, kind: str, **tensors: torch.Tensor) -> Path:
    g = torch.Generator().manual_seed(4)
    saved = {
        "encoder.weight": torch.randn(LATENTS, WIDTH, generator=g),
        "encoder.bias": torch.randn(LATENTS, generator=g),
        "decoder.weight": torch.randn(WIDTH, LATENTS, generator=g), **tensors,
    }  # fmt: skip
    folder.mkdir(parents=True)
    torch.save(saved, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": kind}}))
    return folder


@pytest.mark.parametrize(
    ("kind", "tensors"),
    [
        ("AutoEncoder", {"bias": torch.ones(WIDTH)}),
        ("AutoEncoderTopK", {"b_dec": torch.ones(WIDTH), "k": torch.tensor(7)}),
        ("BatchTopKSAE", {"b_dec": torch.ones(WIDTH), "k": torch.tensor(7),
                          "threshold": torch.tensor(2.5)}),
    ],
)  # fmt: skip
def test_dictionaries(kind: str, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    folder = dictionary(tmp_path / "ae", kind, **tensors)
    coder = dictionary_learning.read(folder).coder
    assert check_written(coder, dictionary_learning.reference(folder), rows()).largest_code > 1


# into a run


def test_a_coder_that_went_out_and_came_back_has_the_same_figures(
    evaluated: Run, store_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = next(n for n in evaluated.coder_names() if n.endswith("skip_transcoder-binary-k8-s0"))
    export_coders(evaluated, [name], "sparsify-binary", tmp_path / "out")
    main_ok("import", tmp_path / "out", "--store", store_path, "--runs", tmp_path / "runs")
    run = Run.open(tmp_path / "runs" / "imported")
    (label,) = run.coder_names()
    assert label == "layers.2.mlp/sparsify-out"
    about = run.coder(label).about
    assert about["lr"] is None and about["imported"]["format"] == "sparsify"
    assert about["imported"]["checked"]["rows"] > 100 and len(about["imported"]["sha256"]) == 64
    assert run.config().steps is None and run.config().imported
    small = ["--no-probe", "--ablation-bins", "0", "--ce-tokens", "256"]
    main_ok("eval", run.folder, *small)
    theirs = read_evaluation(run).coders[label]
    ours = read_evaluation(evaluated).coders[name]
    assert theirs["fvu"] == ours["fvu"] and theirs["l0"] == ours["l0"]
    main_ok("report", run.folder, evaluated.folder, "--out", tmp_path / "both.html")
    page = (tmp_path / "both.html").read_text()
    assert "Imported: the coders of imported were trained elsewhere" in page
    main_ok("report", run.folder, "--figures", tmp_path / "figures")
    main_ok("info", run.folder)
    assert "imported: trained elsewhere" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        main(["train", "--resume", str(run.folder), "--tokens", "99999"])
    assert done.value.code == 2
    assert "were trained elsewhere" in capsys.readouterr().err


def test_several_sources_make_one_run(run: Run, store_path: Path, tmp_path: Path) -> None:
    export_coders(run, ["*-continuous-k4*"], "sparsify", tmp_path / "a")
    export_coders(run, ["skip_transcoder-continuous-k8*"], "sparsify", tmp_path / "b")
    made = import_coders([tmp_path / "a", tmp_path / "b"], store_path, runs=tmp_path, name="all")
    assert len(made.coder_names()) == 4 and len(set(made.coder_names())) == 4


Damage = Callable[[Path], object]


def cfg(**changes: Any) -> Damage:
    def change(folder: Path) -> None:
        path = folder / "cfg.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "sae.safetensors"
        tensors = load_file(path)
        save_file(tensors | {name: change(tensors[name]).contiguous()}, path)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cfg(activation="binary"), "activation 'binary' has no counterpart"),
        (cfg(activation=["topk"]), "has no counterpart"),
        (cfg(k=True), "k should be int, found True"),
        (cfg(k="4"), "k should be int, found '4'"),
        (cfg(k=10**9), "k=1000000000 is more than n_latents"),
        (cfg(k=-3), "k"),
        (cfg(transcode=False), "an SAE with a skip path"),
        (cfg(activation="topk_binary"), "should be"),
        (cfg(tied_decoder=True), "tied_decoder has no"),
        (cfg(gram_lookup=True), "gram_lookup has no"),
        (lambda f: (f / "cfg.json").write_text("[" * 100_000), "cfg.json"),
        (lambda f: (f / "cfg.json").write_bytes(b"\xff\xfe{"), "cfg.json"),
        (lambda f: os.truncate(f / "sae.safetensors", 100), "cannot be read"),
        (lambda f: (f / "sae.safetensors").write_bytes(b"\xff" * 64), "cannot be read"),
        (tensor("W_dec", lambda t: t * torch.nan), "W_dec hold values that are not finite"),
        (tensor("W_dec", lambda t: t[:-1]), "should be"),
        (tensor("W_dec", lambda t: t[0]), "no matrix W_dec"),
        (tensor("encoder.weight", lambda t: t[:, :-1]), "should be|maps rows of width"),
        (tensor("encoder.bias", lambda t: t.unsqueeze(0)), "should be"),
        (tensor("W_skip", lambda t: t[:3]), "should be|do not go together"),
        (tensor("encoder.weight", lambda t: t * 1e38), "not finite"),
        (lambda f: (f / "sae.safetensors").unlink(), "no coder of any known format"),
    ],
)
def test_what_is_damaged_is_one_message_and_leaves_nothing(
    damage: Damage, message: str, run: Run, store_path: Path, tmp_path: Path
) -> None:
    export_coders(run, ["skip_transcoder-continuous-k8*"], "sparsify", tmp_path / "out")
    damage(tmp_path / "out" / "layers.2.mlp")
    with pytest.raises(UserError, match=message):
        import_coders([tmp_path / "out"], store_path, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("standard", {"apply_b_dec_to_input": False, "b_dec": torch.ones(3)}, "do not go together"),
        ("topk", {"k": 4, "rescale_acts_by_decoder_norm": True, "W_dec": torch.ones(9)},
         "do not go together|no matrix"),
        ("jumprelu", {"threshold": torch.tensor(1.0)}, "do not go together"),
        ("standard", {"activation_fn_str": "topk"}, "a standard with activation 'topk'"),
        ("standard", {"scaling_factor": torch.full((LATENTS,), 2.0)}, "a scaling_factor has no"),
        ("gated", {}, "architecture 'gated' has no counterpart"),
        ("topk", {}, "k should be int, found None"),
    ],
)  # fmt: skip
def test_saelens_files_that_are_damaged_or_have_no_counterpart(
    architecture: str, changes: dict[str, Any], message: str, store_path: Path, tmp_path: Path
) -> None:
    folder = sae_files(tmp_path / "sae", architecture, **changes)
    with pytest.raises(UserError, match=message):
        import_coders([folder], store_path, runs=tmp_path / "runs", hookpoint="layers.2.mlp")


def test_a_dictionary_in_bfloat16_is_read_in_float32(tmp_path: Path) -> None:
    folder = dictionary(tmp_path / "ae", "AutoEncoder", bias=torch.ones(WIDTH))
    saved = torch.load(folder / "ae.pt", weights_only=True)
    torch.save({n: t.bfloat16() for n, t in saved.items()}, folder / "ae.pt")
    coder = dictionary_learning.read(folder).coder
    assert check_written(coder, dictionary_learning.reference(folder), rows()).largest_code > 1


def of_the_store(store: ActivationStore) -> CoderConfig:
    """A transcoder that circuit-tracer holds, as wide as the store's rows."""
    hook = store.hookpoint("layers.0.mlp")
    base = next(c for s, n, c in kinds() if (s, n) == ("transcoder", "batch top-k"))
    return base.model_copy(update={"d_in": hook.d_in, "d_out": hook.d_out})


def test_what_is_said_of_the_place_is_not_overruled(
    store: ActivationStore, store_path: Path, tmp_path: Path
) -> None:
    """Rows of a wrong place give wrong figures, which no check of the files would see."""
    config = of_the_store(store)
    name = str(store.attributes["model"]["name"])
    for folder in (tmp_path / "hooks", tmp_path / "layers"):
        folder.mkdir()
        coders = {i: random_coder(config) for i in range(2 if folder.name == "layers" else 1)}
        circuit_tracer.write_set(coders, folder, name)
    path = tmp_path / "hooks" / "config.yaml"
    path.write_text(path.read_text().replace("mlp.hook_in", "ln2.hook_normalized"))
    sae = sae_files(tmp_path / "sae", "standard", metadata={"hook_name": "blocks.0.hook_mlp_out"})
    for source in (tmp_path / "hooks", tmp_path / "layers", sae):
        with pytest.raises(UserError, match="Give --hookpoint"):
            import_coders([source], store_path, runs=tmp_path / "runs")
    other = {"model_name": "Qwen3-0.6B", "hf_hook_name": "layers.0.mlp.output"}
    sae_files(tmp_path / "other", "standard", metadata=other)
    with pytest.raises(UserError, match=r"a coder of Qwen3-0.6B, but"):
        import_coders([tmp_path / "other"], store_path, runs=tmp_path / "runs")


class _Runs:
    """Would run something if it were unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.proof,))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_that_would_run_something_does_not(
    how: str, store_path: Path, tmp_path: Path
) -> None:
    folder = dictionary(tmp_path / "ae", "AutoEncoder", bias=torch.ones(WIDTH))
    hostile = {"encoder.weight": _Runs(tmp_path / "proof")}
    if how == "torch":
        torch.save(hostile, folder / "ae.pt")
    else:
        (folder / "ae.pt").write_bytes(pickle.dumps(hostile))
    with pytest.raises(UserError, match="not a file of tensors alone"):
        import_coders([folder], store_path, runs=tmp_path / "runs")
    assert not (tmp_path / "proof").exists()


def test_what_does_not_belong_to_the_store_is_refused(
    run: Run, store_path: Path, store: ActivationStore, tmp_path: Path
) -> None:
    width = store.hookpoint("layers.2.mlp").d_out
    own = {"W_enc": torch.randn(width, 8), "b_enc": torch.zeros(8), "W_dec": torch.randn(8, width),
           "b_dec": torch.zeros(width)}  # fmt: skip

    def source(name: str, **changes: Any) -> Path:
        return sae_files(tmp_path / name, "standard", **{**own, **changes})

    def wrong(folder: Path, message: str, **how: Any) -> None:
        with pytest.raises(UserError, match=message):
            import_coders([folder], store_path, runs=tmp_path / "runs", **how)

    other = {"sae_lens_version": "6.0", "model_name": "gpt2-small"}
    wrong(source("a"), "Give --hookpoint")
    wrong(source("b", metadata=other), "a coder of gpt2-small, but", hookpoint="layers.2.mlp")
    wrong(sae_files(tmp_path / "c", "standard"), "maps rows of width", hookpoint="layers.2.mlp")
    wrong(tmp_path / "a", "no hookpoint 'layers.9.mlp'", hookpoint="layers.9.mlp")
    wrong(tmp_path / "a", "should be auto or one of", format_="saelen")
    wrong(tmp_path / "a", "no coder of sparsify here", format_="sparsify")
    wrong(tmp_path / "none", "no such folder")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "layers.2.mlp").symlink_to(tmp_path / "a")
    wrong(tmp_path / "linked", "no coder of any known format")
    made = import_coders([tmp_path / "b"], store_path, runs=tmp_path / "runs", same_model=True,
                         hookpoint="layers.2.mlp")  # fmt: skip
    with pytest.raises(UserError, match=r"a complete run is here|not empty"):
        import_coders(
            [tmp_path / "a"], store_path, runs=tmp_path / "runs", hookpoint="layers.2.mlp"
        )
    assert made.coder_names() == ["layers.2.mlp/saelens-b"]


def test_circuit_tracers_layers_come_in_together(
    store: ActivationStore, store_path: Path, tmp_path: Path
) -> None:
    config = of_the_store(store)
    folder = tmp_path / "set"
    folder.mkdir()
    name = str(store.attributes["model"]["name"])
    circuit_tracer.write_set({0: random_coder(config)}, folder, name)
    made = import_coders([folder], store_path, runs=tmp_path / "runs")
    assert made.coder_names() == ["layers.0.mlp/circuit-tracer-set"]
    text = (folder / "config.yaml").read_text()
    for more, message in (
        ('"activation": "topk", ', "selects without a relu"),
        ("!!python/object/apply:os.system [true] ", "not YAML"),
    ):
        (folder / "config.yaml").write_text(text.replace("{", "{" + more, 1))
        with pytest.raises(UserError, match=message):
            import_coders([folder], store_path, runs=tmp_path / "other")
