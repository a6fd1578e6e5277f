"""The index tables of RaggedPairs: invariants without floating point, in the exact and in the padded form."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import ROUTINGS, mask, padded_pairs
from torch import Tensor

from mova_kernels import RaggedPairs, device_routing
from mova_kernels.routing import Routing

# Enough small masks to meet every way of being empty or full, from sparse to dense.
RANDOM = [
    torch.rand(int(b), int(n), generator=torch.Generator().manual_seed(seed)) < density
    for seed, (b, n) in enumerate(torch.randint(1, 9, (50, 2), generator=torch.Generator().manual_seed(0)))
    for density in (0.1, 0.5, 0.9)
]
EDGES = {
    **ROUTINGS,
    "one expert": torch.rand(5, 1, generator=torch.Generator().manual_seed(0)) < 0.5,
    "64 experts, the most there may be": torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) < 0.5,
    "one sample": mask("x.xx"),
}
edges = pytest.mark.parametrize("selected", EDGES.values(), ids=EDGES)
FORMS = {"exact": RaggedPairs.from_routing, "padded": padded_pairs}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def listed(selected: Tensor) -> list[tuple[int, int]]:
    """(expert, sample) of all pairs, in the promised order."""
    num_samples, num_experts = selected.shape
    return [(e, b) for e in range(num_experts) for b in range(num_samples) if selected[b, e]]


def check_tables(pairs: RaggedPairs, selected: Tensor, rows: dict[tuple[int, int], int]) -> None:
    """The tables are those of the pairs in ``selected``, whose rows are ``rows[expert, sample]``."""
    expected = listed(selected)
    num_samples, num_experts = selected.shape
    used = len(expected)
    assert torch.equal(pairs.selected, selected)
    expert, sample, row = (t[:used].tolist() for t in (pairs.expert, pairs.sample, pairs.row))
    assert list(zip(expert, sample, strict=True)) == expected
    assert row == [rows[pair] for pair in expected]

    per_expert = [sum(e == i for i, _ in expected) for e in range(num_experts)]
    assert pairs.expert_offsets.tolist() == [sum(per_expert[:e]) for e in range(num_experts + 1)]
    per_sample = [sum(b == i for _, i in expected) for b in range(num_samples)]
    assert pairs.sample_offsets.tolist() == [sum(per_sample[:b]) for b in range(num_samples + 1)]

    assert sorted(pairs.by_sample.tolist()) == list(range(pairs.num_pairs))
    by_sample = pairs.by_sample[:used].tolist()
    assert [(sample[p], expert[p]) for p in by_sample] == sorted((b, e) for e, b in expected)

    assert max(per_sample, default=0) <= pairs.most_per_sample <= num_experts
    tables = (pairs.sample, pairs.expert, pairs.row, pairs.by_sample)
    assert all(t.shape == (pairs.num_pairs,) for t in tables)
    assert all(t.dtype == torch.int64 for t in (*tables, pairs.expert_offsets, pairs.sample_offsets))
    for t, size in ((pairs.sample, num_samples), (pairs.expert, num_experts), (pairs.row, num_samples)):
        assert ((t >= 0) & (t < max(size, 1))).all(), "padding must not point outside"
    if pairs.host_offsets is not None:
        assert pairs.num_pairs == used and pairs.host_offsets == tuple(pairs.expert_offsets.tolist())
        assert pairs.most_per_sample == max(per_sample, default=0)
    else:
        assert used <= pairs.num_pairs == num_samples * pairs.most_per_sample


def expected_rows(selected: Tensor, packed: list[bool]) -> dict[tuple[int, int], int]:
    rank = {(e, b): int(selected[:b, e].sum()) for e, b in listed(selected)}
    return {(e, b): rank[e, b] if packed[e] else b for e, b in rank}


@forms
@edges
def test_tables_at_the_edges(selected, form) -> None:
    check_tables(form(selected), selected, expected_rows(selected, [True] * selected.shape[1]))


def test_tables_of_random_routings() -> None:
    for i, selected in enumerate(RANDOM):
        packed = [bool((i >> e) & 1) for e in range(selected.shape[1])]
        check_tables(RaggedPairs.from_routing(selected, packed), selected, expected_rows(selected, packed))


def test_padded_tables_of_random_routings() -> None:
    """One compiled graph serves every routing of a shape, so that a table fixed while tracing would show."""
    packed = [True, False, True, True]
    torch._dynamo.reset()

    def build(selected: Tensor) -> RaggedPairs:
        return RaggedPairs.from_routing(selected, packed)

    compiled = torch.compile(build, fullgraph=True, backend="eager", dynamic=False)
    for selected in torch.rand(30, 5, 4) < torch.linspace(0, 1, 30)[:, None, None]:
        check_tables(compiled(selected), selected, expected_rows(selected, packed))


@pytest.mark.parametrize("packed", [[True, True, False], [False, False, False]], ids=["mixed", "dense"])
@forms
def test_row_is_the_rank_or_the_sample(packed, form) -> None:
    selected = mask("x.x", "...", "xx.", "x.x")
    pairs = form(selected, packed)
    assert pairs.row[:6].tolist() == [0, 1 if packed[0] else 2, 2 if packed[0] else 3, 0 if packed[1] else 2, 0, 3]


@forms
@pytest.mark.parametrize("most", [1, 2, 3])
def test_topk_keeps_the_rows_of_the_features(form, most) -> None:
    """A gate that keeps fewer experts does not pack the features anew."""
    for selected in RANDOM[:: 10 if form is RaggedPairs.from_routing else 40]:
        packed = [e % 2 == 0 for e in range(selected.shape[1])]
        scores = torch.where(selected, torch.rand(selected.shape), -1)
        best = scores.topk(min(most, selected.shape[1])).indices
        kept = selected & torch.zeros_like(selected).scatter(1, best, True)
        check_tables(form(selected, packed).topk(kept, most), kept, expected_rows(selected, packed))


def test_topk_of_few_experts_is_free() -> None:
    selected = mask("xx.", "..x")
    pairs = RaggedPairs.from_routing(selected)
    assert pairs.topk(selected, 2) is pairs


def test_topk_under_compile() -> None:
    selected, kept = mask("xxx", "..x", "x.x"), mask("x.x", "..x", "x..")
    torch._dynamo.reset()

    def build(selected: Tensor, kept: Tensor) -> RaggedPairs:
        return RaggedPairs.from_routing(selected).topk(kept, 2)

    pairs = torch.compile(build, fullgraph=True, backend="eager")(selected, kept)
    assert pairs.num_pairs == 6, "the table shrinks to B * topk"
    check_tables(pairs, kept, expected_rows(selected, [True] * 3))


@forms
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float64], ids=str)
def test_routings_of_every_dtype_are_equal(dtype, form) -> None:
    selected = mask("x.x", "...", "xx.")
    check_tables(form(selected.to(dtype)), selected, expected_rows(selected, [True] * 3))


@forms
def test_strides_of_the_routing_are_honoured(form) -> None:
    selected = mask("x.x", "...", "xx.", "x.x")
    for view in (selected.t(), selected[:, ::2], selected[:1].expand(3, 3)):
        check_tables(form(view), view.contiguous(), expected_rows(view, [True] * view.shape[1]))


def test_routing_stays_as_it_was() -> None:
    selected = mask("x.x", "xx.")
    RaggedPairs.from_routing(selected).topk(mask("x..", "x.."), 1)
    assert torch.equal(selected, mask("x.x", "xx."))


def test_padded_form_checks_values_when_it_runs() -> None:
    with pytest.raises(RuntimeError, match="routing must hold only 0 and 1"):
        padded_pairs(torch.tensor([[0.0, 2.0]]))


@pytest.mark.parametrize(
    ("routing", "error", "message"),
    [
        ([[True]], TypeError, "routing must be a tensor, got 'list'"),
        (torch.ones(3), ValueError, r"routing must have shape \(B, N\), got \(3,\)"),
        (torch.ones(1, 2, 3), ValueError, r"routing must have shape \(B, N\), got \(1, 2, 3\)"),
        (torch.tensor([[0, 2]]), ValueError, r"routing must hold only 0 and 1, got \[2\]"),
        (torch.tensor([[1.0, 0.5]]), ValueError, r"routing must hold only 0 and 1, got \[0\.5\]"),
        (torch.tensor([[1.0, torch.nan]]), ValueError, r"routing must hold only 0 and 1, got \[nan\]"),
        (torch.tensor([[-1]]), ValueError, r"routing must hold only 0 and 1, got \[-1\]"),
        (torch.ones(1, 2, dtype=torch.complex64), TypeError, "routing must be bool, .*got torch.complex64"),
    ],
)
def test_bad_routing(routing, error, message) -> None:
    with pytest.raises(error, match=message):
        RaggedPairs.from_routing(routing)


def straight_through(p: Tensor) -> Tensor:
    return (p > 0.5).float() + p - p.detach()


REFUSED = r"routing must not require grad, .*pass routing\.detach\(\)"


def test_a_routing_with_a_derivative_is_refused() -> None:
    p = torch.tensor([[0.9, 0.2], [0.4, 0.6]])
    gumbel = torch.nn.functional.gumbel_softmax(p.clone().requires_grad_(), hard=True)
    for routing in (gumbel, straight_through(p.clone().requires_grad_()), p.round().requires_grad_()):
        with pytest.raises(ValueError, match=REFUSED):
            RaggedPairs.from_routing(routing)
        assert RaggedPairs.from_routing(routing.detach().round()).num_pairs == 2
    with pytest.raises(ValueError, match=REFUSED):
        torch.func.grad(lambda p: RaggedPairs.from_routing(p).num_pairs * p.sum())(p.round())
    with pytest.raises(ValueError, match=REFUSED):
        torch.func.jvp(lambda p: RaggedPairs.from_routing(p).num_pairs * p.sum(), (p.round(),), (p,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match=REFUSED):
        RaggedPairs.from_routing(torch.autograd.forward_ad.make_dual(p.round(), p))


def test_a_nearly_whole_routing_is_refused_by_its_value() -> None:
    with pytest.raises(ValueError, match=r"routing must hold only 0 and 1, got \[0\.9999999"):
        RaggedPairs.from_routing(torch.tensor([[1.0, 1 - 2**-24]]))


def test_packed_has_one_entry_per_expert() -> None:
    with pytest.raises(ValueError, match="packed must have 3 entries, got 2"):
        RaggedPairs.from_routing(mask("x.x"), [True, False])


def test_device_routing_pads_as_the_compiler_does() -> None:
    selected = mask("x.x", "...", ".xx")
    compiled = padded_pairs(selected)
    with device_routing():
        pairs = RaggedPairs.from_routing(selected)
    assert pairs.host_offsets is None
    torch.testing.assert_close(pairs.tables, compiled.tables, rtol=0, atol=0)
    assert RaggedPairs.from_routing(selected).host_offsets is not None


@pytest.mark.parametrize("selected", [mask("x.x", "..x"), mask("x.x", "xxx")], ids=["odd", "even"])
def test_tables_on_a_device_are_aligned(selected) -> None:
    """At 16 bytes, whatever the numbers of pairs, samples and experts: alignment is a part of what Triton compiles."""
    pairs = RaggedPairs.from_routing(selected, device="meta")
    assert [t.storage_offset() % 2 for t in pairs.tables] == [0] * 6
    assert [len(t) for t in pairs.tables] == [len(t) for t in RaggedPairs.from_routing(selected).tables]


def test_device_routing_refuses_a_routing_on_the_host() -> None:
    """Copying it would synchronise."""
    with device_routing(), pytest.raises(ValueError, match=r"routing must be on meta in .*, got device\(type='cpu'\)"):
        RaggedPairs.from_routing(mask("x.x"), device="meta")
    with device_routing(), pytest.raises(ValueError, match="routing must be on meta"):
        Routing.validated(mask("x.x"), torch.device("meta"))


@pytest.mark.parametrize("table", ["sample", "expert", "row", "expert_offsets", "by_sample", "sample_offsets"])
def test_tables_of_other_lengths_are_refused(table) -> None:
    pairs = RaggedPairs.from_routing(torch.ones(3, 2))
    with pytest.raises(ValueError, match="the tables of pairs must have the shapes"):
        dataclasses.replace(pairs, **{table: getattr(pairs, table)[:-1]})
