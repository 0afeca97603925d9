from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
import torch
import zarr
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import bsc.cache.capture.capture as capture_module
from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.capture.source import Source
from bsc.cache.model.hookpoints import RowTap, expand_braces, match_hookpoints
from bsc.cache.model.models import load_model
from bsc.cache.model.text import read_text
from bsc.cache.model.text_source import TextSource
from bsc.cache.model.tokens import context_batches
from bsc.cache.store.store import ActivationStore
from bsc.cache.store.verify import verify
from bsc.devices import multiplies_bfloat16
from bsc.errors import UserError
from tests.conftest import EMBEDDED, make_model


def bits(rows: torch.Tensor) -> np.ndarray:
    return rows.contiguous().view(torch.int16).numpy().view(np.uint16)


def independent_rows(
    model: torch.nn.Module, ids: torch.Tensor, hook: str
) -> dict[str, torch.Tensor]:
    """Input and output of a module in a whole forward pass with plain hooks."""
    seen: dict[str, torch.Tensor] = {}

    def keep(module: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        seen["input"], seen["output"] = args[0].clone(), output.clone()

    handle = model.get_submodule(hook).register_forward_hook(keep)
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return {side: rows.flatten(0, 1).bfloat16() for side, rows in seen.items()}


def arithmetic(store: ActivationStore) -> torch.dtype:
    """What the model computed in: bfloat16, or float32 on a CPU without instructions for it."""
    wanted = torch.bfloat16 if multiplies_bfloat16(torch.device("cpu")) else torch.float32
    found: torch.dtype = getattr(torch, store.attributes["model"]["dtype"])
    assert found == wanted
    return found


def held_out_contexts(store: ActivationStore) -> np.ndarray:
    """Token ids of the held-out split, which keeps its order: (contexts, context)."""
    ids = store.held_out.tokens("token_id")
    n = len(ids) // store.context
    return ids[: n * store.context].reshape(n, store.context).astype(np.int64)


def test_stored_rows_are_those_of_an_independent_forward_pass_bit_for_bit(
    store: ActivationStore, tiny_model: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=arithmetic(store)).eval()
    ids = held_out_contexts(store)
    for hook in ("layers.0.mlp", "layers.2.mlp"):
        for side in ("input", "output"):
            stored = np.concatenate(
                [store.held_out.shard(f"{hook}/{side}", i) for i in range(store.held_out.shards)]
            ).view(np.uint16)
            # The same batches as the capture: 16 contexts of 32 tokens.
            for start in range(0, len(ids) // 16 * 16, 16):
                batch = torch.from_numpy(ids[start : start + 16])
                rows = independent_rows(model.model, batch, hook)[side]
                here = stored[start * 32 : (start + 16) * 32]
                assert np.array_equal(here, bits(rows)), (hook, side, start)


def test_tensorstore_and_zarr_open_every_array_with_the_bits_that_the_capture_saw(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    real = Source.block

    def record(self: Any, batch: Any) -> Any:
        block = real(self, batch)
        for name, values in block.items():
            seen.setdefault(f"{batch.split}:{name}", []).append(values.clone())
        return block

    monkeypatch.setattr(Source, "block", record)
    path = tmp_path / "acts"
    capture(
        CaptureConfig(
            model=str(tiny_model), store=path, text=TextSource(corpus="stdlib", held_out=0.2),
            hookpoints=("layers.1.mlp",), tokens=3_000, held_out_tokens=1_000, context=32,
            batch_tokens=512,
        )
    )  # fmt: skip
    store = ActivationStore(path)
    group: Any = zarr.open_group(path / "data.zarr", mode="r")
    arrays = 0
    for split in store.splits.values():
        # Where every captured row went: (document, position of the token in the text) is unique.
        order = None
        for name, spec in split.specs.items():
            folder = path / "data.zarr" / spec.path
            a = ts.open({"driver": "zarr3", "kvstore": f"file://{folder}/"}).result()
            expected = ml_dtypes.bfloat16 if spec.dtype == "bfloat16" else np.dtype(spec.dtype)
            assert a.dtype.numpy_dtype == expected and a.shape[0] == split.rows
            by_tensorstore = np.asarray(a.read().result())
            by_zarr = np.asarray(group[spec.path][:])
            assert by_tensorstore.tobytes() == by_zarr.tobytes()
            mapped = np.concatenate([split.shard(name, i) for i in range(split.shards)])
            assert mapped.tobytes() == by_zarr.tobytes()
            raw = torch.cat(seen[f"{split.split}:{name}"])
            captured = bits(raw) if spec.dtype == "bfloat16" else raw.numpy().astype(spec.dtype)
            stored = by_zarr.view(np.uint16) if spec.dtype == "bfloat16" else by_zarr
            captured = captured.reshape(len(captured), -1)
            stored = stored.reshape(len(stored), -1)
            if split.split == "held_out":
                assert np.array_equal(stored, captured[: len(stored)])
            else:  # scattered: the same rows in another order, the same for every array
                if order is None:
                    order = _order(split, seen)
                assert np.array_equal(stored, captured[order])
            arrays += 1
    assert arrays == 12


def _order(split: object, seen: dict[str, list[torch.Tensor]]) -> np.ndarray:
    """For every stored row the number of the captured row, by all token arrays."""
    names = ("tokens/token_id", "tokens/doc_id", "tokens/position", "tokens/ngram")
    captured = np.stack([torch.cat(seen[f"train:{n}"]).numpy() for n in names], axis=1)
    stored = np.stack([split.tokens(n.split("/")[1]).astype(np.int64) for n in names], axis=1)  # type: ignore[attr-defined]
    where: dict[tuple[int, ...], list[int]] = {}
    for i, key in enumerate(map(tuple, captured.tolist())):
        where.setdefault(key, []).append(i)
    x = torch.cat(seen["train:layers.1.mlp/input"])
    rows = np.concatenate(
        [split.shard("layers.1.mlp/input", i) for i in range(split.shards)]  # type: ignore[attr-defined]
    ).view(np.uint16)
    order = []
    for key, row in zip(map(tuple, stored.tolist()), rows, strict=True):
        # Tokens that repeat at one position of one document are told apart by their rows.
        match = next(i for i in where[key] if np.array_equal(bits(x[i]), row))
        where[key].remove(match)
        order.append(match)
    return np.array(order)


def test_the_true_smollm2_135m_shape_is_captured_at_the_layers_of_the_paper(tmp_path: Path) -> None:
    make_model(
        tmp_path / "model", vocab_size=49_152, hidden_size=576, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        max_position_embeddings=2048,
    )  # fmt: skip
    capture(
        CaptureConfig(
            model=str(tmp_path / "model"), store=tmp_path / "acts",
            text=TextSource(corpus="stdlib", held_out=0.2), hookpoints=("layers.{0,9,18,27}.mlp",),
            tokens=512, held_out_tokens=256, context=128, batch_tokens=256,
        )
    )  # fmt: skip
    store = ActivationStore(tmp_path / "acts")
    assert [(h.name, h.d_in, h.d_out) for h in store.hookpoints] == [
        (f"layers.{i}.mlp", 576, 576) for i in (0, 9, 18, 27)
    ]
    model = AutoModel.from_pretrained(tmp_path / "model", dtype=arithmetic(store)).eval()
    ids = torch.from_numpy(held_out_contexts(store))
    assert ids.shape == (2, 128)
    for hook in store.hookpoints:
        rows = independent_rows(model, ids, hook.name)
        for side in ("input", "output"):
            stored = np.concatenate(
                [
                    store.held_out.shard(f"{hook.name}/{side}", i)
                    for i in range(store.held_out.shards)
                ]
            )
            assert np.array_equal(stored.view(np.uint16), bits(rows[side])), (hook.name, side)


def test_the_forward_pass_stops_after_the_last_hookpoint(tiny_model: Path) -> None:
    lm = load_model(str(tiny_model))
    ran = []
    for i, layer in enumerate(lm.base.layers):  # type: ignore[arg-type]
        layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    RowTap(lm.base, ["layers.1.mlp"]).rows({"input_ids": torch.zeros((1, 4), dtype=torch.int64)})
    assert ran == [0, 1]


def test_two_captures_are_the_same_file_for_file_but_for_times(
    tiny_model: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        capture(
            CaptureConfig(
                model=str(tiny_model), store=tmp_path / name, context=32, batch_tokens=512,
                text=TextSource(corpus="stdlib"), hookpoints=("layers.1.mlp",), tokens=2_500,
            )
        )  # fmt: skip
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()]
    differ = [
        str(f)
        for f in files
        if (tmp_path / "a" / f).read_bytes() != (tmp_path / "b" / f).read_bytes()
    ]
    assert differ in ([], ["provenance.json"])
    drop = ("started_at", "completed", "xxh3_128")
    a, b = (json.loads((tmp_path / n / "provenance.json").read_text()) for n in "ab")
    assert {k: v for k, v in a.items() if k not in drop} == {
        k: v for k, v in b.items() if k not in drop
    }


def test_no_document_is_both_trained_on_and_held_out(store: ActivationStore) -> None:
    train, held_out = (set(s.tokens("doc_id").tolist()) for s in store.splits.values())
    assert train and held_out and not train & held_out


def test_tokens_are_those_of_the_tokenizer_with_a_begin_token_before_each_document() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    source = list(read_text(TextSource(corpus="stdlib", held_out=0.0)))[:20]
    batches = list(context_batches(source, tokenizer, context=16, batch=4, wanted={"train": 10**9}))
    ids = np.concatenate([b.token_id.reshape(-1) for b in batches])
    expected = [i for d in source for i in [0, *tokenizer(d.text)["input_ids"]]]
    assert ids.tolist() == expected[: len(ids)] and len(expected) - len(ids) < 16
    docs = np.concatenate([b.doc_id.reshape(-1) for b in batches])
    assert np.array_equal(np.unique(docs), [d.number for d in source])
    assert (np.diff(docs)[ids[1:] == 0] == 1).all()


def test_patterns_name_modules_and_a_star_stays_in_its_part(tiny_model: Path) -> None:
    base = load_model(str(tiny_model)).base
    assert match_hookpoints(base, ["layers.*.mlp"]) == [f"layers.{i}.mlp" for i in range(3)]
    assert match_hookpoints(base, ["layers.{2,0}.mlp"]) == ["layers.0.mlp", "layers.2.mlp"]
    assert expand_braces("{a,b}.{c,d}") == ["a.c", "a.d", "b.c", "b.d"]
    with pytest.raises(UserError, match=r"did you mean 'layers\.\d\.mlp'"):
        match_hookpoints(base, ["layer.1.mlp"])


def test_a_capture_that_comes_to_nothing_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(UserError, match="not one whole context"):
        capture(
            CaptureConfig(
                model=str(tiny_model), store=tmp_path / "deep/acts", tokens=2_500,
                text=TextSource(files=(str(tmp_path / "short.txt"),), held_out=0.0),
            )
        )  # fmt: skip
    assert not (tmp_path / "deep/acts").exists()


def test_text_that_fails_on_the_way_keeps_what_was_committed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = read_text

    def failing(source: TextSource, rank: int, writers: int) -> Any:
        for i, document in enumerate(real(source, rank, writers)):
            if i == 8:
                raise UserError("--dataset a/b: cannot be read: the connection broke.")
            yield document

    monkeypatch.setattr(capture_module, "read_text", failing)
    monkeypatch.setattr("bsc.cache.model.tokens._DOCUMENTS_AT_ONCE", 2)
    with pytest.raises(UserError, match=r"the connection broke\. .* keeps the [\d,]+ rows"):
        capture(
            CaptureConfig(
                model=str(tiny_model), store=tmp_path / "acts", text=TextSource(corpus="stdlib"),
                tokens=100_000, context=32, hookpoints=("layers.1.mlp",), window=2,
            )
        )  # fmt: skip
    store = ActivationStore(tmp_path / "acts")
    assert store.train.rows > 0 and not store.complete
    assert list(verify(tmp_path / "acts")) == []


def test_a_module_whose_output_is_changed_in_place_later_is_stored_as_it_was() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.last = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            y: torch.Tensor = self.mlp(torch.ones(*input_ids.shape, 4))
            y += 100
            return self.last(y)  # type: ignore[no-any-return]

    block = Block()
    rows = RowTap(block, ["mlp", "last"]).rows(
        {"input_ids": torch.zeros((2, 3), dtype=torch.int64)}
    )
    assert rows["mlp/output"].abs().max() < 50
    assert rows["last/input"].min() > 50


def test_modules_without_one_row_per_token_are_refused(tiny_model: Path) -> None:
    lm = load_model(str(tiny_model))
    with pytest.raises(UserError, match=r"not one row for each|not a tensor"):
        RowTap(lm.base, ["rotary_emb"]).rows({"input_ids": torch.zeros((2, 8), dtype=torch.int64)})


def test_more_open_files_than_the_system_allows_are_refused_with_what_would_fit(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (200, 200))
    with pytest.raises(UserError, match=r"needs [\d,]+ open files.* --window \d+ would fit"):
        capture(
            CaptureConfig(
                model=str(tiny_model), store=tmp_path / "acts", text=TextSource(corpus="stdlib"),
                tokens=200_000,
            )
        )  # fmt: skip
    assert not (tmp_path / "acts").exists()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**7))
    with pytest.raises(
        UserError, match=r"needs .* free\. What would fit: --ring \d+ .*--tokens \d"
    ):
        capture(
            CaptureConfig(
                model=str(tiny_model), store=tmp_path / "acts", text=TextSource(corpus="stdlib"),
                tokens=100_000,
            )
        )  # fmt: skip
    assert not (tmp_path / "acts").exists()
