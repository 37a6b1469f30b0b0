"""The benchmark of many adapters: what it measures computes the same in every form, and its page has every case."""

from __future__ import annotations

import json

import bench_serving
import pytest
import torch


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("form", bench_serving.FORMS)
def test_each_form_adds_what_its_adapters_with_their_zeros_add(form, count) -> None:
    torch.manual_seed(0)
    own = bench_serving.adapters(form, count, 24, 40)
    x, y = torch.randn(count, 5, 24), torch.randn(count, 5, 40)
    whole = own.dense(24, 40)
    assert whole.a.shape[2] == 24
    expected = torch.stack([y[each] + x[each] @ (whole.b[each] @ whole.a[each]).T for each in range(count)])
    torch.testing.assert_close(own.add_to(y.clone(), x), expected, atol=1e-4, rtol=1e-4)


def test_the_page_has_every_case(tmp_path) -> None:
    bench_serving.main(["--quick", "--repeats", "1", "--out", str(tmp_path)])
    cases = json.loads((tmp_path / "serving.json").read_text())["cases"]
    page = (tmp_path / "serving.md").read_text()
    assert len(cases) == len(bench_serving.TOKENS) * len(bench_serving.COUNTS)
    assert sum(line.startswith("| q of 64 | decode") for line in page.splitlines()) == len(bench_serving.COUNTS)
