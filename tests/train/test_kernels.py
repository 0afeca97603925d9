from __future__ import annotations

import pytest
import torch

from bsc.train.coders import kernels

N, F, D, K = 37, 50, 6, 5


@pytest.fixture
def parts() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "pre": torch.randn(N, F, generator=g, dtype=torch.float64),
        "table": torch.randn(F, D, generator=g, dtype=torch.float64),
        "rows": torch.randn(N, D, generator=g, dtype=torch.float64),
        "weight": torch.randn(N, K, generator=g, dtype=torch.float64),
    }


def dense(index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros(N, F, dtype=weight.dtype).scatter(1, index, weight)


def test_select_takes_the_k_largest(parts: dict[str, torch.Tensor]) -> None:
    values, index = kernels.select_topk(parts["pre"], K)
    floor = parts["pre"].sort(dim=1, descending=True).values[:, K - 1 : K]
    assert (values >= floor).all() and torch.equal(parts["pre"].gather(1, index), values)
    assert all(len(set(row.tolist())) == K for row in index)


def test_ties_give_each_latent_at_most_once() -> None:
    _, index = kernels.select_topk(torch.zeros(4, 9), 3)
    assert all(len(set(row.tolist())) == 3 for row in index)


def test_decode_is_code_times_table(parts: dict[str, torch.Tensor]) -> None:
    index = kernels.select_topk(parts["pre"], K)[1]
    expected = dense(index, parts["weight"]) @ parts["table"]
    torch.testing.assert_close(kernels.decode(index, parts["weight"], parts["table"]), expected)


def test_decoder_dot_is_grad_times_table(parts: dict[str, torch.Tensor]) -> None:
    index = kernels.select_topk(parts["pre"], K)[1]
    expected = (parts["rows"] @ parts["table"].T).gather(1, index)
    torch.testing.assert_close(kernels.decoder_dot(parts["rows"], parts["table"], index), expected)


def test_latent_sums_are_code_transposed_times_rows(parts: dict[str, torch.Tensor]) -> None:
    index = kernels.select_topk(parts["pre"], K)[1] % 40  # latents 40 to 49 are never selected
    index[:, 1:] = (index[:, :1] + torch.arange(1, K)) % 40
    transposed = kernels.transpose(index, F)
    expected = dense(index, parts["weight"]).T @ parts["rows"]
    found = kernels.latent_sums(transposed, parts["weight"], parts["rows"])
    torch.testing.assert_close(found, expected)
    assert not found[40:].any()
