from __future__ import annotations

import itertools

import pytest
import torch

from bsc.train.coders import kernels, topk
from bsc.train.coders.kernels import Entries

N, F, D, K = 37, 50, 6, 5


@pytest.fixture
def parts() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "pre": torch.randn(N, F, generator=g, dtype=torch.float64),
        "table": torch.randn(F, D, generator=g, dtype=torch.float64),
        "rows": torch.randn(N, D, generator=g, dtype=torch.float64),
        "weight": torch.randn(N * K, generator=g, dtype=torch.float64),
    }


def ragged(entries: Entries) -> Entries:
    """The same entries less every third, so that rows differ in number and one row has none."""
    keep = torch.arange(len(entries.row)) % 3 != 0
    keep &= entries.row != 4
    row = entries.row[keep]
    per_row = torch.bincount(row, minlength=N)
    return Entries(entries.latent[keep], row, (per_row.cumsum(0) - per_row).int())


def dense(entries: Entries, weight: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(N, F, dtype=weight.dtype)
    out[entries.row.long(), entries.latent.long()] = weight
    return out


def check_topk(pre: torch.Tensor, k: int) -> None:
    values, index = topk.select_topk(pre, k)
    assert values.shape == index.shape == (len(pre), k)
    assert torch.equal(pre.gather(1, index), values)
    expected = pre.float().sort(dim=1, descending=True).values[:, :k]
    assert torch.equal(values.float().sort(dim=1, descending=True).values, expected)
    assert (index.sort(dim=1).values.diff(dim=1) > 0).all()  # each latent at most once


@pytest.mark.parametrize(
    ("n_latents", "k"),
    [*itertools.product((512, 1536, 1000, 9216), (1, 3, 16, 100)), (50, 50), (64, 16), (97, 7)],
)
def test_select_takes_the_k_largest_exactly(n_latents: int, k: int) -> None:
    g = torch.Generator().manual_seed(k)
    pre = torch.randn(33, n_latents, generator=g)
    for values in (pre, pre - 5, pre.abs(), (pre * 3).round(), torch.zeros_like(pre)):
        for dtype in (torch.bfloat16, torch.float32):
            check_topk(values.to(dtype), k)


def test_select_works_on_a_slice_of_wider_rows_and_on_infinities() -> None:
    wide = torch.randn(20, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    check_topk(wide[:, 1024:3072], 8)
    wide[:, 5] = torch.inf
    wide[3] = -torch.inf
    check_topk(wide, 8)


def test_the_cascade_is_used_where_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the tests above would be of torch.topk."""
    used = []
    real = topk._cascade

    def noted(pre: torch.Tensor, k: int, folds: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        used.append(folds)
        return real(pre, k, folds)

    monkeypatch.setattr(topk, "_cascade", noted)
    for dtype in (torch.bfloat16, torch.float32):
        for k in (1, 16, 100):
            topk.select_topk(torch.randn(3, 9216).to(dtype), k)
    assert used == [(8, 8), (8, 8), (4, 4)] * 2


def test_a_row_of_nan_gives_nan_so_that_it_is_noticed() -> None:
    pre = torch.randn(4, 2048).bfloat16()
    pre[2] = torch.nan
    values, _ = topk.select_topk(pre, 4)
    assert values[2].isnan().all() and not values[[0, 1, 3]].isnan().any()


def test_groupmax_takes_the_largest_of_every_group(parts: dict[str, torch.Tensor]) -> None:
    values, index = topk.groupmax(parts["pre"], K)
    groups = parts["pre"].view(N, K, F // K)
    assert torch.equal(values, groups.amax(2))
    assert torch.equal(index // (F // K), torch.arange(K).expand(N, K))
    assert torch.equal(parts["pre"].gather(1, index), values)
    some, where = topk.group_topk(parts["pre"], K, 3)
    assert torch.equal(some, groups.sort(2, descending=True).values[:, :, :3])
    assert torch.equal(parts["pre"].gather(1, where.flatten(1)), some.flatten(1))


@pytest.mark.parametrize("lopsided", [False, True])
def test_batch_topk_takes_the_largest_of_the_batch(
    parts: dict[str, torch.Tensor], lopsided: bool
) -> None:
    pre = parts["pre"].clone()
    if lopsided:  # one row has more of them than the first look takes
        pre[7] += 100
    values, entries, smallest = topk.batch_topk(pre, 2)
    floor = pre.flatten().sort(descending=True).values[2 * N - 1]
    assert smallest == floor and len(values) == 2 * N
    assert torch.equal(pre[entries.row.long(), entries.latent.long()], values)
    assert set(zip(*(t.tolist() for t in (pre >= floor).nonzero(as_tuple=True)), strict=True)) == (
        set(zip(entries.row.tolist(), entries.latent.tolist(), strict=True))
    )
    per_row = torch.bincount(entries.row, minlength=N)
    assert torch.equal(entries.offsets.long(), per_row.cumsum(0) - per_row)
    assert (int(per_row.max()) == F) == lopsided


@pytest.mark.parametrize("shape", ["even", "ragged"])
def test_sparse_sums_are_those_of_the_dense_code(
    parts: dict[str, torch.Tensor], shape: str
) -> None:
    entries = Entries.of(topk.select_topk(parts["pre"][:, :40], K)[1])  # the last ten: never
    if shape == "ragged":
        entries = ragged(entries)
    weight = parts["weight"][: len(entries.row)]
    code = dense(entries, weight)
    torch.testing.assert_close(
        kernels.decode(entries, weight, parts["table"]), code @ parts["table"]
    )
    products = parts["rows"] @ parts["table"].T
    by_latent = kernels.transpose(entries, F)
    expected = products[entries.row.long(), entries.latent.long()][by_latent.order]
    found = kernels.decoder_dot(parts["rows"], parts["table"], by_latent)
    torch.testing.assert_close(found, expected)
    sums = kernels.latent_sums(by_latent, weight[by_latent.order], parts["rows"])
    torch.testing.assert_close(sums, code.T @ parts["rows"])
    assert not sums[40:].any()


def test_gradients_of_codes_are_the_same_some_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    g = torch.Generator().manual_seed(0)
    rows, table = torch.randn(61, 8, generator=g), torch.randn(5, 8, generator=g)
    latents = torch.rand(61, 5, generator=g).topk(3).indices
    by_latent = kernels.transpose(Entries.of(latents), 5)
    monkeypatch.setattr(kernels, "_core_cache", lambda: 1 << 20)
    assert kernels._rows_at_a_time(rows, 61 * 3 / 5) is None
    whole = kernels.decoder_dot(rows, table, by_latent)
    monkeypatch.setattr(kernels, "_core_cache", lambda: 1000)
    assert kernels._rows_at_a_time(rows, 61 * 3 / 5) == 4  # 16 rows have 512 bytes
    assert torch.equal(kernels.decoder_dot(rows, table, by_latent), whole)
    expected = (rows @ table.T)[by_latent.row.long(), by_latent.latent.long()]
    torch.testing.assert_close(whole, expected)
    assert kernels._rows_at_a_time(rows, 2.0) is None  # the table would be read too often


def test_bfloat16_sums_round_once() -> None:
    """A bag of thousands of rows in bfloat16 is the float32 bag rounded, not a sum of roundings."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, 64, generator=g).bfloat16()
    entries = Entries.of(torch.zeros(4000, 1, dtype=torch.int64))
    weight = torch.rand(4000, generator=g).bfloat16()
    found = kernels.latent_sums(kernels.transpose(entries, 2), weight, rows)[0]  # in that order
    exact = weight.double() @ rows.double()
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-2).all()


@pytest.mark.parametrize(("n_latents", "k"), [(8, 1), (300, 32), (2048, 3), (16, 16)])
def test_the_threshold_of_a_row_makes_k_of_its_sigmoids(n_latents: int, k: int) -> None:
    g = torch.Generator().manual_seed(0)
    pre = 3 * torch.randn(200, n_latents, generator=g)
    pre[100:] = 40 * pre[100:] - 100  # most sigmoids flat: where Newton's method alone diverges
    t = topk.newton_shift(pre, k)
    assert t.shape == (200, 1) and t.isfinite().all()
    found = torch.sigmoid(pre.double() + t.double()).sum(1)
    torch.testing.assert_close(
        found[:100], torch.full((100,), float(k)).double(), rtol=2e-3, atol=0
    )
    if k < n_latents:  # flat ones: within one latent
        assert ((found[100:] - k).abs() < 1).double().mean() > 0.9
    rounded = topk.newton_shift(pre.bfloat16(), k)
    assert rounded.dtype == torch.float32


@pytest.mark.parametrize(
    "shift", [0.0, -3.0, -30.0, 30.0], ids=["mixed", "few positive", "negative", "positive"]
)
@pytest.mark.parametrize("k", [4, 16, 60])
def test_selection_by_bits_is_exact_whatever_the_signs(shift: float, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pre = (torch.randn(70, 1024, generator=generator) + shift).bfloat16()
    pre[3] = -pre[3].abs()  # a row of its own, that a look at some rows may miss
    pre[5, ::2] = -torch.inf
    pre[7] = 0.0
    pre[9] = -0.0
    values, index = topk.select_topk(pre, k)
    assert torch.equal(pre.gather(1, index), values)
    assert all(len(set(row)) == k for row in index.tolist())
    expected = pre.float().topk(k, dim=1).values
    assert torch.equal(values.float().sort(dim=1, descending=True).values, expected)


@pytest.mark.parametrize("n_latents", [131_072, 300_004])
def test_rows_too_wide_for_16_bits_are_selected_exactly(n_latents: int) -> None:
    """Places among candidates take the place of columns; or topk all of it."""
    check_topk(torch.randn(3, n_latents, generator=torch.Generator().manual_seed(2)).bfloat16(), 5)
