"""The byte budget, and who has to go."""

from __future__ import annotations

import pytest
import torch

from mova import FeatureCache


def entry(value: float, numbers: int = 4) -> torch.Tensor:
    return torch.full((numbers,), float(value))  # 16 bytes


def test_what_is_put_comes_back():
    cache = FeatureCache(100)
    cache.put(("sam", "a"), entry(1))
    assert torch.equal(cache.get(("sam", "a")), entry(1))
    assert cache.get(("sam", "b")) is None
    assert (cache.hits, cache.misses, cache.bytes, len(cache)) == (1, 1, 16, 1)


def test_the_least_recently_used_goes_first():
    cache = FeatureCache(48)
    for key in "abc":
        cache.put(key, entry(1))
    cache.get("a")
    cache.put("d", entry(1))
    assert [cache.get(key) is not None for key in "abcd"] == [True, False, True, True]


def test_a_tensor_above_the_budget_is_not_kept_and_drives_no_other_out():
    cache = FeatureCache(32)
    cache.put("a", entry(1))
    cache.put("b", entry(1, 100))
    assert cache.get("b") is None and cache.get("a") is not None


def test_a_key_put_again_has_its_new_tensor_and_counts_once():
    cache = FeatureCache(100)
    cache.put("a", entry(1))
    cache.put("a", entry(2, 8))
    assert torch.equal(cache.get("a"), entry(2, 8)) and cache.bytes == 32


def test_a_row_does_not_keep_its_batch_alive():
    cache = FeatureCache(100)
    batch = torch.zeros(1000, 4)
    cache.put("a", batch[3])
    assert cache.get("a").untyped_storage().nbytes() == 16


def test_discard_and_clear():
    cache = FeatureCache(100)
    cache.put("a", entry(1))
    cache.put("b", entry(1))
    cache.discard("a")
    cache.discard("unknown")
    assert cache.bytes == 16
    cache.clear()
    assert (cache.bytes, len(cache)) == (0, 0)


@pytest.mark.parametrize(("budget", "error"), [(-1, ValueError), (1.5, TypeError)])
def test_a_bad_budget_is_named(budget, error):
    with pytest.raises(error, match="budget"):
        FeatureCache(budget)
