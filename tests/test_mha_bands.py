"""Dense masks that are bands are recognised, others are not, and results do not change."""

from __future__ import annotations

import pytest
import saccade
import torch
from saccade.nn._bands import as_band

N = 70


def _hidden(left: int | None, right: int | None, rows: int = N, keys: int = N) -> torch.Tensor:
    delta = torch.arange(keys) - torch.arange(rows)[:, None]
    kept = torch.ones(rows, keys, dtype=torch.bool)
    if left is not None:
        kept &= delta >= -left
    if right is not None:
        kept &= delta <= right
    return ~kept


@pytest.mark.parametrize("bounds", [(None, 0), (5, 0), (0, 5), (3, 3), (None, None), (0, 0), (None, 68)])
@pytest.mark.parametrize("sizes", [(N, N), (N, 130), (130, N)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_bands_are_seen(bounds: tuple[int | None, int | None], sizes: tuple[int, int], kind: str) -> None:
    mask = _hidden(*bounds, *sizes)
    given = mask if kind == "bool" else torch.zeros(sizes).masked_fill_(mask, -torch.inf)
    band = as_band(given)
    assert band is not None and torch.equal(~band.materialize(*sizes), mask)


def test_other_masks_are_not() -> None:
    causal = torch.zeros(N, N).masked_fill_(_hidden(None, 0), -torch.inf)
    holed, finite, learnt = causal.clone(), causal.clone(), causal.clone().requires_grad_()
    holed[40, 3] = -torch.inf
    finite[40, 3] = 0.5
    nearly = causal.clone().nan_to_num(neginf=-1e9)
    for mask in (holed, finite, learnt, nearly, _hidden(None, -1), causal[:40, :40].contiguous()):
        assert as_band(mask) is None


def test_a_changed_tensor_is_read_again() -> None:
    mask = _hidden(None, 0)
    assert as_band(mask) is not None
    mask[50, 2] = True
    assert as_band(mask) is None


@pytest.mark.parametrize("need_weights", [False, True])
def test_results_are_those_of_the_dense_mask(need_weights: bool) -> None:
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True).double()
    ours = saccade.nn.MultiheadAttention(16, 2, batch_first=True).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, N, 16, dtype=torch.float64)
    padding = torch.zeros(2, N, dtype=torch.bool)
    padding[1, 60:] = True
    for mask in (_hidden(None, 0), _hidden(6, 2)):
        expected = theirs(x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=need_weights)
        got = ours(x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=need_weights)
        rows = ~(mask | padding[:, None]).all(-1)  # torch answers rows without keys with NaN or the bias
        torch.testing.assert_close(got[0][rows], expected[0][rows], rtol=1e-10, atol=1e-12)
