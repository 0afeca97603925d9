"""How documents become contexts, and that those of one context do not mix."""

from __future__ import annotations

import shutil
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.model.hookpoints import RowTap, match_hookpoints
from bsc.cache.model.models import load_model
from bsc.cache.model.text import TextDocument, read_text
from bsc.cache.model.text_source import PACKINGS, Packing, TextSource
from bsc.cache.model.tokens import context_batches
from bsc.cache.store.store import ActivationStore
from bsc.cache.store.verify import verify
from bsc.errors import UserError
from tests.conftest import EMBEDDED

HOOK = "layers.2.mlp"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EMBEDDED)


@pytest.fixture(scope="module")
def documents() -> list[TextDocument]:
    return list(islice(read_text(TextSource(corpus="stdlib", held_out=0.3)), 25))


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_token_of_every_document_comes_once_and_in_order(
    tokenizer: Any, documents: list[TextDocument], packing: Packing
) -> None:
    expected = {d.number: [0, *tokenizer(d.text)["input_ids"]] for d in documents}
    wanted = {"train": 10**9, "held_out": 10**9}
    batches = list(
        context_batches(
            documents, tokenizer, context=48, batch=4, wanted=wanted, packing=packing  # type: ignore[arg-type]
        )
    )  # fmt: skip
    found: dict[int, list[int]] = {}
    for batch in batches:
        rows = batch.rows()
        for document, token in zip(rows["doc_id"].tolist(), rows["token_id"].tolist(), strict=True):
            found.setdefault(document, []).append(token)
    dropped = sum(len(ids) - len(found.get(n, [])) for n, ids in expected.items())
    assert dropped <= (0 if packing == "none" else 2 * 47)  # what a last context lacks
    assert all(expected[n][: len(ids)] == ids for n, ids in found.items())
    for batch in batches:
        real = np.ones_like(batch.token_id, bool) if batch.real is None else batch.real
        place = np.broadcast_to(np.arange(real.shape[1]), real.shape)
        if packing != "masked":
            assert np.array_equal(batch.position, place)
        else:  # 0 where a document or a context begins, else one more than before
            begins = np.ones_like(real)
            begins[:, 1:] = np.diff(batch.doc_id, axis=1) != 0
            steps = np.diff(batch.position, axis=1)
            assert (batch.position[begins] == 0).all() and (steps[~begins[:, 1:]] == 1).all()
        if packing == "none":  # one document per context
            owner = np.where(real, batch.doc_id, batch.doc_id[:, :1])
            assert (owner == batch.doc_id[:, :1]).all()


@pytest.mark.parametrize("packing", PACKINGS)
def test_batches_that_go_on_from_any_point_are_those_of_the_whole_run(
    tokenizer: Any, documents: list[TextDocument], packing: Packing
) -> None:
    def run(starts: Any = None) -> list[Any]:
        return list(
            context_batches(
                documents, tokenizer, context=48, batch=4, packing=packing, starts=starts,
                wanted={"train": 10**9, "held_out": 3_000},
            )
        )  # fmt: skip

    whole = run()
    by_split = {s: [b for b in whole if b.split == s] for s in ("train", "held_out")}
    n_train, n_held_out = (len(by_split[s]) for s in ("train", "held_out"))
    assert n_train > 20 and n_held_out > 5
    for i, j in ((0, 3), (7, 1), (n_train // 2, n_held_out - 1), (n_train - 1, 2)):
        starts = {"train": by_split["train"][i].point, "held_out": by_split["held_out"][j].point}
        again = run(starts)
        for split, first in (("train", i), ("held_out", j)):
            resumed = [b for b in again if b.split == split]
            expected = by_split[split][first:]
            assert len(resumed) == len(expected)
            for a, b in zip(resumed, expected, strict=True):
                assert a.point == b.point
                for x, y in zip(a[1:4], b[1:4], strict=True):
                    assert np.array_equal(x, y)


@pytest.mark.parametrize("packing", ["masked", "none"])
def test_stored_rows_are_those_of_each_document_alone(
    tiny_model: Path, tmp_path: Path, packing: Packing
) -> None:
    capture(
        CaptureConfig(
            model=str(tiny_model), store=tmp_path / "acts", packing=packing, dtype="float32",
            text=TextSource(corpus="stdlib", held_out=0.5), hookpoints=(HOOK,), tokens=300,
            held_out_tokens=1_500, context=64, batch_tokens=512,
        )
    )  # fmt: skip
    split = ActivationStore(tmp_path / "acts").held_out
    ids, position = split.tokens("token_id").astype(np.int64), split.tokens("position")
    starts = np.flatnonzero(position == 0)
    model = AutoModel.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tap = RowTap(model, [HOOK])
    stored = torch.cat([split.tensor(f"{HOOK}/output", i) for i in range(split.shards)]).float()
    compared = 0
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        alone = tap.rows({"input_ids": torch.from_numpy(ids[start:stop]).unsqueeze(0)})
        expected = alone[f"{HOOK}/output"].float()
        torch.testing.assert_close(stored[start:stop], expected, rtol=2e-2, atol=2e-3)
        compared += stop - start
    assert compared == split.rows and len(starts) > split.rows / 64


def make_bert(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=4096, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, folder / name)
    return folder


def test_an_encoder_is_captured_with_the_two_modules_of_its_mlp(tmp_path: Path) -> None:
    model = make_bert(tmp_path / "bert")
    pair = "encoder.layer.*.intermediate@encoder.layer.*.output.dense"
    capture(
        CaptureConfig(
            model=str(model), store=tmp_path / "acts", hookpoints=(pair,), tokens=300,
            text=TextSource(corpus="stdlib", held_out=0.5), held_out_tokens=600, context=32,
            batch_tokens=128,
        )
    )  # fmt: skip
    store = ActivationStore(tmp_path / "acts")
    names = [pair.replace("*", str(i)) for i in range(2)]
    assert [(h.name, h.d_in, h.d_out) for h in store.hookpoints] == [(n, 32, 32) for n in names]
    assert list(verify(tmp_path / "acts")) == []
    # Independent of our masks: each document of a context alone, through plain hooks.
    bert = BertModel.from_pretrained(model).eval()
    layer = bert.encoder.layer[1]
    seen: dict[str, torch.Tensor] = {}
    layer.intermediate.register_forward_hook(lambda m, a, o: seen.update(x=a[0].clone()))
    layer.output.dense.register_forward_hook(lambda m, a, o: seen.update(y=o.clone()))
    split = store.held_out
    ids, position = split.tokens("token_id").astype(np.int64), split.tokens("position")
    starts = np.flatnonzero(position == 0)
    rows = {
        side: torch.cat([split.tensor(f"{names[1]}/{side}", i) for i in range(split.shards)])
        for side in ("input", "output")
    }
    for start, stop in pairwise(starts):
        with torch.no_grad():
            bert(input_ids=torch.from_numpy(ids[start:stop]).unsqueeze(0))
        for side, key in (("input", "x"), ("output", "y")):
            part = rows[side][start:stop].float()
            torch.testing.assert_close(part, seen[key][0], rtol=2e-2, atol=2e-3)


def test_a_tokenizer_that_adds_special_tokens_itself_is_left_alone() -> None:
    class Own:
        bos_token_id = eos_token_id = 9

        def __call__(self, text: Any, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
            texts = [text] if isinstance(text, str) else text
            marks = ([1], [2]) if add_special_tokens else ([], [])
            ids = [[*marks[0], *map(ord, t), *marks[1]] for t in texts]
            return {"input_ids": ids[0] if isinstance(text, str) else ids}

    documents = [TextDocument(0, "ab", False), TextDocument(1, "c", False)]
    (batch,) = context_batches(documents, Own(), context=7, batch=9, wanted={"train": 7})
    assert batch.token_id.tolist() == [[1, 97, 98, 2, 1, 99, 2]]


def test_pairs_need_as_many_inputs_as_outputs(tiny_model: Path) -> None:
    base = load_model(str(tiny_model)).base
    found = match_hookpoints(base, ["layers.{0,2}.input_layernorm@layers.{0,2}.mlp"])
    assert found == [f"layers.{i}.input_layernorm@layers.{i}.mlp" for i in (0, 2)]
    with pytest.raises(UserError, match="3 modules before the @ and 1 after it"):
        match_hookpoints(base, ["layers.*.mlp@layers.1.mlp"])
    with pytest.raises(UserError, match="different numbers of alternatives"):
        match_hookpoints(base, ["layers.{0,1}.mlp@layers.1.mlp"])
