"""The cache that delphi reads: every firing, in contexts that are those of the store."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from bsc.cache.store.store import ActivationStore
from bsc.eval.exports import delphi
from bsc.eval.interp.config import InterpConfig
from bsc.eval.interp.material import Materials
from bsc.train.run import Run
from tests.eval.interp.command import main_ok


def test_the_cache_of_delphi_is_exact(
    evaluated: Run, tmp_path: Path, store: ActivationStore
) -> None:
    """Read by delphi's own rules, it holds every firing of the coder."""
    for name in (n for n in evaluated.coder_names() if n.endswith("k4-s0")):
        out = tmp_path / name.replace("/", "-")
        main_ok("export", evaluated.folder, name, "--format", "delphi", "--out", out)
        (place,) = (out / "latents").iterdir()
        firings = []
        expected_start = 0
        for path in sorted(place.glob("*.safetensors"), key=lambda p: int(p.stem.split("_")[0])):
            first, last = map(int, path.stem.split("_"))
            assert first == expected_start
            expected_start = last + 1
            arrays = load_file(path)
            locations = arrays["locations"].astype(np.int64)
            assert len(locations) and locations[:, 2].max() <= last - first
            # unique_consecutive finds excerpts only where rows are in order.
            order = np.lexsort((locations[:, 2], locations[:, 1], locations[:, 0]))
            assert np.array_equal(order, np.arange(len(order)))
            firings += [
                (int(arrays["tokens"][c, p]), int(c), int(p), int(latent + first), float(v))
                for (c, p, latent), v in zip(locations, arrays["activations"], strict=True)
            ]
        assert expected_start == 64
        coder = evaluated.coder(name)
        ids, length = store.held_out.tokens("token_id"), store.context
        wanted = []
        side = "output" if coder.config.side == "output" else "input"
        rows = store.held_out.tensor(f"layers.2.mlp/{side}", 0)
        code = coder.encode(rows)
        for row, (latents, values) in enumerate(zip(code.latent, code.value, strict=True)):
            for latent, value in zip(latents.tolist(), values.tolist(), strict=True):
                if value != 0 and row < len(ids) // length * length:
                    wanted.append((int(ids[row]), row // length, row % length, latent, value))
        own = [f for f in firings if f[1] * length + f[2] < len(rows)]
        assert [f[:4] for f in sorted(own)] == [w[:4] for w in sorted(wanted)]
        assert np.allclose([f[4] for f in sorted(own)], [w[4] for w in sorted(wanted)], rtol=2e-3)
        if "binary" in name:
            assert {f[4] for f in firings} == {1.0}
        config = json.loads((place / "config.json").read_text())
        assert config["ctx_len"] == length
        counts = torch.load(out / "log" / "hookpoint_firing_counts.pt", weights_only=True)
        assert int(counts["layers.2.mlp"].sum()) == len(firings)


def test_contexts_of_one_document_each_end_where_another_writers_shard_begins() -> None:
    class Split:
        rows: ClassVar = {
            "token_id": np.array([300, 301, 302, 202, 203, 204, 205, 400, 401]),
            "position": np.array([0, 1, 2, 5, 6, 7, 8, 0, 1]),
            "doc_id": np.array([3, 3, 3, 2, 2, 2, 2, 4, 4], dtype=np.uint64),
        }

        def tokens(self, name: str) -> Any:
            return self.rows[name]

    store = SimpleNamespace(held_out=Split(), context=8, packing="none")
    materials: Any = SimpleNamespace(store=store)
    tokens, context, position = delphi._contexts(materials, np.ones(9, bool))
    assert [list(t[t > 0]) for t in tokens] == [[300, 301, 302], [202, 203, 204, 205], [400, 401]]
    assert list(context) == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert list(position) == [0, 1, 2, 0, 1, 2, 3, 0, 1]


def test_the_cache_is_written_in_parts_without_empty_ones(
    evaluated: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    materials = Materials(evaluated, InterpConfig(), store=None, model=None)
    material = materials.of(materials.names[0])
    delphi.write_delphi_cache(materials, material, tmp_path / "whole")
    monkeypatch.setattr(delphi, "FIRINGS_AT_ONCE", 40)
    delphi.write_delphi_cache(materials, material, tmp_path / "parts")

    def firings(folder: Path) -> set[tuple[int, ...]]:
        found: set[tuple[int, ...]] = set()
        for path in folder.rglob("*.safetensors"):
            locations = load_file(path)["locations"].astype(np.int64)
            assert len(locations)
            locations[:, 2] += int(path.stem.split("_")[0])
            found |= {tuple(x) for x in locations.tolist()}
        return found

    assert firings(tmp_path / "parts") == firings(tmp_path / "whole")
    assert len(list((tmp_path / "parts").rglob("*.safetensors"))) > 3
