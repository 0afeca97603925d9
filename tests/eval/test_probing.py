from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from bsc.cache.model.models import load_model
from bsc.errors import UserError
from bsc.eval.config import EMBEDDED
from bsc.eval.figures.labelled import LabelledTexts, read_labelled, read_sets
from bsc.eval.figures.pooling import POOLINGS, Features, pooled_codes
from bsc.eval.figures.probing import (
    at_most,
    class_splits,
    probe,
    probing_figures,
)
from bsc.eval.passes.setting import open_setting
from bsc.train.run import Run
from bsc.typed import write_typed

N, F = 240, 30


def labelled(labels: list[str]) -> LabelledTexts:
    return LabelledTexts(
        "planted", ["x"] * len(labels), labels, [str(i) for i in range(len(labels))]
    )


def features(dense: np.ndarray) -> Features:
    return {p: sparse.csr_matrix(dense) for p in POOLINGS}


def noise(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.exponential(size=(N, F)) * (rng.random((N, F)) < 0.3)


LABELS = [("a", "b", "c")[i % 3] for i in range(N)]


def test_a_planted_class_latent_is_found_by_one_latent() -> None:
    dense = noise()
    for column, label in ((4, "a"), (17, "b"), (20, "c")):
        dense[:, column] = [2.0 if x == label else 0.0 for x in LABELS]
    found = probe(features(dense), class_splits(labelled(LABELS)))
    for arm in ("sae_bench", *POOLINGS):
        assert found[arm]["1"]["accuracy"] == 1.0, arm
        assert found[arm]["1"]["classes"] == {"a": 1.0, "b": 1.0, "c": 1.0}
        assert found[arm]["1"]["interval"] is None  # three classes


def test_shuffled_labels_are_chance() -> None:
    rng = np.random.default_rng(0)
    accuracies = []
    for seed in range(6):
        dense = noise(seed)
        dense[:, 4] = [2.0 if x == "a" else 0.0 for x in LABELS]
        shuffled = [str(x) for x in rng.permutation(LABELS)]
        found = probe(features(dense), class_splits(labelled(shuffled), seed=seed))
        accuracies += [found["mean"][k]["accuracy"] for k in ("1", "2", "5")]
    assert np.mean(accuracies) == pytest.approx(0.5, abs=0.04)


def test_rescaling_latents_changes_the_recipe_but_not_the_standardised_arm() -> None:
    rng = np.random.default_rng(1)
    dense = noise()
    dense[:, 4] += [0.3 * rng.random() if x == "a" else 0.0 for x in LABELS]
    scale = 10.0 ** rng.uniform(-4, 2, size=F)
    splits = class_splits(labelled(LABELS))
    plain, scaled = probe(features(dense), splits), probe(features(dense * scale), splits)
    for arm in POOLINGS:
        assert plain[arm] == scaled[arm]
    assert plain["sae_bench"] != scaled["sae_bench"]


def test_classes_are_balanced_and_groups_stay_on_one_side() -> None:
    rng = np.random.default_rng(0)
    labels = [str(x) for x in rng.choice(["a", "b", "c"], size=400, p=[0.7, 0.2, 0.1])]
    groups = [f"{x}{i // 7}" for i, x in enumerate(labels)]
    found = LabelledTexts("t", ["x"] * 400, labels, groups)
    splits = class_splits(found, max_train=40, max_test=10)
    train, test = set(), set()
    for label, split in splits.items():
        for rows, own in ((split.train, split.train_label), (split.test, split.test_label)):
            assert own.mean() == 0.5 and len(set(rows)) == len(rows)
            assert all((labels[i] == label) == bool(y) for i, y in zip(rows, own, strict=True))
        assert len(split.train) <= 80 and len(split.test) <= 20
        train |= {groups[i] for i in split.train}
        test |= {groups[i] for i in split.test}
    assert not train & test
    others = [labels[i] for i in splits["c"].train[splits["c"].train_label == 0]]
    assert abs(others.count("a") - others.count("b")) <= 1  # evenly from the other classes


def test_a_group_with_several_labels_is_on_one_side() -> None:
    """A file of texts of both classes must not be learned from and tested on."""
    rng = np.random.default_rng(0)
    groups = [f"g{i // 10}" for i in range(400)]
    labels = [str(x) for x in rng.choice(["a", "b", "c"], size=400)]
    for seed in range(5):
        splits = class_splits(LabelledTexts("t", ["x"] * 400, labels, groups), seed=seed)
        train = {groups[i] for s in splits.values() for i in s.train}
        test = {groups[i] for s in splits.values() for i in s.test}
        assert not train & test
        assert 0.2 < len(test) / 40 < 0.45
    # One group holds most of a class: it is trained on, and the others are enough to test.
    groups = ["big"] * 90 + [f"s{i}" for i in range(10)] + [f"o{i}" for i in range(100)]
    labels = ["a"] * 100 + ["b"] * 100
    for seed in range(5):
        split = class_splits(LabelledTexts("t", ["x"] * 200, labels, groups), seed=seed)["a"]
        assert "big" in {groups[i] for i in split.train} and len(split.test) >= 2
    with pytest.raises(UserError, match="of too few groups"):
        class_splits(LabelledTexts("t", ["x"] * 8, ["a", "b"] * 4, ["one"] * 8))


def test_two_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    rows = "".join(f'{{"text": "t {i}", "label": {i % 2}}}\n' for i in range(12))
    paths = [tmp_path / folder / "set.jsonl" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(rows)
    with pytest.raises(UserError, match="2 sets are called 'set'"):
        read_sets([str(p) for p in paths])
    assert len(read_sets([str(paths[0])])) == 1


def test_pooled_codes_are_those_of_each_text_by_itself(run: Run, tiny_model: Path) -> None:
    lm = load_model(str(tiny_model), dtype="float32")
    names = [n for n in run.coder_names() if "k8" in n or "sae" in n]
    coders = {n: ("layers.2.mlp", run.coder(n)) for n in names}
    texts = ["def f(x):\n    return x", "import os", "a b c d e f g h i j k l m n o p q r s t u v"]
    found, channels = pooled_codes(lm, texts, coders, without_tokens=(), length=16, batch=2)
    for name, (hook, coder) in coders.items():
        for i, text in enumerate(texts):
            ids = lm.tokenizer(text)["input_ids"][:15]
            rows: dict[str, torch.Tensor] = {}
            module = lm.base.get_submodule(hook)
            handle = module.register_forward_hook(
                lambda m, args, out, rows=rows: rows.update(input=args[0][0], output=out[0])
            )
            with torch.no_grad():
                lm.base(torch.tensor([[lm.tokenizer.bos_token_id, *ids]]))
            handle.remove()
            x = rows[coder.config.side][1:].bfloat16().float()  # without the special token
            code = coder.encode(x)
            dense = torch.zeros(len(x), 64).scatter(1, code.latent, code.value)
            for pooling, plain in (
                ("mean", dense.mean(0)), ("max", dense.max(0).values), ("last", dense[-1]),
            ):  # fmt: skip
                ours = torch.from_numpy(found[name][pooling][i].todense()).squeeze(0).float()
                # A near tie of two margins may fall the other way in another batch.
                assert ((ours - plain).abs() > 0.02 * plain.abs().max()).sum() <= 2
            mean = channels[f"{hook}/{coder.config.side}"]["mean"][i].todense()
            assert np.allclose(mean, x.mean(0), atol=2e-2)


def test_rows_that_no_coder_was_trained_on_are_not_pooled(run: Run, tiny_model: Path) -> None:
    """Tokens that the run left out, and rows that are not finite."""
    lm = load_model(str(tiny_model), dtype="float32")
    hook, bad = "layers.2.mlp", 4
    coders = {n: (hook, run.coder(n)) for n in run.coder_names() if "k8" in n or "sae" in n}
    text = "a b c d e f g h i j k l m n o p q r s t u v"
    ids = [lm.tokenizer.bos_token_id, *lm.tokenizer(text)["input_ids"]][:16]
    seen: dict[str, torch.Tensor] = {}

    def spoil(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, bad] = torch.nan
        seen.update(input=args[0][0], output=output[0])
        return output

    handle = lm.base.get_submodule(hook).register_forward_hook(spoil)
    found, channels = pooled_codes(lm, [text], coders, without_tokens=(ids[3], ids[7]), length=16)
    handle.remove()
    kept = [i for i in range(1, 16) if i != bad and ids[i] not in (ids[3], ids[7])]
    assert 5 < len(kept) < 13
    for name, (_, coder) in coders.items():
        x = seen[coder.config.side][kept].bfloat16().float()
        code = coder.encode(x)
        dense = torch.zeros(len(x), 64).scatter(1, code.latent, code.value)
        mean = torch.from_numpy(found[name]["mean"][0].todense()).squeeze(0).float()
        torch.testing.assert_close(mean, dense.mean(0), rtol=1e-4, atol=1e-5)
        rows = channels[f"{hook}/{coder.config.side}"]["mean"][0].todense()
        assert np.allclose(rows, x.mean(0), atol=1e-3)


def test_tokens_that_the_run_was_trained_without_are_not_probed(run: Run, tmp_path: Path) -> None:
    texts = ["import os", "import re"] * 4
    labelled = LabelledTexts("t", texts, ["a", "b"] * 4, [str(i) for i in range(8)])
    setting = open_setting(run, store=None, model=None, device="cpu")
    assert probing_figures(setting, [labelled], 8)["t"].texts == 8
    copy = Run(Path(shutil.copytree(run.folder, tmp_path / "run")))
    ids = sorted({i for text in texts for i in setting.lm.tokenizer(text)["input_ids"]})
    write_typed(copy.config_path, copy.config().model_copy(update={"without_tokens": ids}))
    with pytest.raises(UserError, match="has no token to probe"):
        probing_figures(open_setting(copy, store=None, model=None, device="cpu"), [labelled], 8)


def test_the_embedded_set_has_classes_of_some_size() -> None:
    found = read_labelled(EMBEDDED)
    assert len(found.classes) == 8
    sizes = [found.labels.count(c) for c in found.classes]
    assert min(sizes) > 200
    few = at_most(found, 12)
    assert [few.labels.count(c) for c in few.classes] == [12] * 8
    assert len(set(few.groups)) > 40  # from all over, not the first files


def test_files_are_read(tmp_path: Path) -> None:
    rows = [{"text": f"text, {i}\n{i}", "label": i % 2} for i in range(8)]
    lines = tmp_path / "set.jsonl"
    lines.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    found = read_labelled(str(lines))
    assert found.classes == ["0", "1"] and len(found.texts) == 8 and found.name == "set"
    table = tmp_path / "set.csv"
    table.write_text(
        "label,text,group\n" + "".join(f'{i % 2},"a, {i}",g{i // 2}\n' for i in range(8))
    )
    again = read_labelled(str(table))
    assert again.texts[3] == "a, 3" and again.groups[3] == "g1"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("x.jsonl", '{"text": "a", "label": 1}\n' * 9, "all texts have the label '1'"),
        ("x.jsonl", '{"text": "a"}\n', "line 1: each line needs a `text` and a `label`"),
        ("x.jsonl", "[1]\n", "line 1: not a JSON object"),
        ("x.jsonl", "{\n", "line 1: not JSON"),
        ("x.jsonl", "[" * 100_000 + "\n", "line 1: not JSON .nested too deeply"),
        ("x.jsonl", '{"text": "\\ud800", "label": 1}\n', "line 1: not JSON .*surrogates"),
        ("x.csv", "words,label\na,b\n", "line 2: each line needs a `text`"),
        ("x.csv", "text,label\na,x\nb,y\nc,y\nd,y\ne,y\n", "label 'x' has 1 texts of 1 groups"),
        ("x.csv", "", "no text; at least two labels"),
        ("x.txt", "a", "a .csv file with a header or a .jsonl file"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        read_labelled(str(path))
    with pytest.raises(UserError, match=r"no such file"):
        read_labelled(str(tmp_path / "nowhere.csv"))
