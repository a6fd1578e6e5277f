"""The CUDA kernels of expert_attention for Hopper, on the emulator, called through the library's C functions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from emulated_gpu import cuda_on_cpu_tensors
from emulator import SETTINGS, cuda
from extreme_scores import EXTREMES, by_autograd, extreme_problem
from helpers import assert_within_budget, check_budget, value_and_gradients
from test_expert_attention import plain, truth
from torch import Tensor

from mova_kernels import BackendError, _compiled
from mova_kernels.ops import expert_attention, rope2d_table
from mova_kernels.ops.expert_attention import cuda_impl

if cuda.reason():
    pytest.skip(f"nothing to emulate with: {cuda.reason()}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_width = pytest.mark.parametrize("width", [64, 128])


@pytest.fixture(autouse=True)
def library(request: pytest.FixtureRequest) -> Iterator[cuda.Library]:
    if request.config.getoption("--gpu") not in (None, "sm_90"):
        pytest.skip("the kernels are for sm_90a alone")
    with cuda_on_cpu_tensors() as library:
        yield library


def problem(pairs: int, length: int, heads: int, width: int) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """Tokens of the first ``length`` places of a grid."""
    side = math.isqrt(length) + 1
    tables = tuple(t[:length] for t in rope2d_table(side, width))
    return list(torch.randn(3, pairs, length, heads * width)), tables


def op(tables: tuple[Tensor, Tensor], heads: int, num_valid: Tensor | None = None) -> Callable[..., Tensor]:
    return lambda q, k, v: expert_attention(q, k, v, *tables, heads, num_valid=num_valid, backend="cuda")


# pairs, tokens, heads
SHAPES = {
    "less than a tile": (1, 100, 1),
    "a tile of keys and one key": (1, 129, 2),
    "tiles of keys are full, those of queries not": (1, 256, 1),
    "several tiles of both, the last ones cut": (2, 300, 2),
}


@pytest.mark.parametrize("name", SHAPES)
@each_width
@each_dtype
def test_error_budget(dtype, width, name) -> None:
    pairs, length, heads = SHAPES[name]
    _, tables = problem(pairs, length, heads, width)
    draw = lambda: problem(pairs, length, heads, width)[0]  # noqa: E731
    assert_within_budget(truth(tables, heads), op(tables, heads), plain(tables, heads), draw, dtype, draws=3)


def test_official_head() -> None:
    tables = rope2d_table(48, 64)
    draw = lambda: list(torch.randn(3, 1, 48 * 48, 64))  # noqa: E731
    assert_within_budget(truth(tables, 1), op(tables, 1), plain(tables, 1), draw, torch.bfloat16, draws=1)


@each_width
def test_one_token_attends_to_itself(width) -> None:
    """The result is v; the gradients of q and k are differences of equals."""
    inputs, tables = problem(3, 1, 2, width)
    q, k, v = (t.bfloat16() for t in inputs)
    cotangent = torch.randn_like(v)
    out, grad_q, grad_k, grad_v = value_and_gradients(op(tables, 2), (q, k, v), cotangent)
    assert torch.equal(out, v) and torch.equal(grad_v, cotangent)
    for found, factor in ((grad_q, k), (grad_k, q)):  # what the products leave of grad * v, in fp32
        rounding = (cotangent.float() * v.float()).abs().sum() * factor.float().abs().max() * 2**-22
        assert found.abs().max() <= rounding


def test_no_pair(library) -> None:
    inputs, tables = problem(0, 9, 2, 64)
    for part in value_and_gradients(op(tables, 2), [t.bfloat16() for t in inputs]):
        assert part.shape == (0, 9, 128)
    assert not library.launches


# ---- The range of scores


@pytest.mark.parametrize("mode", cuda_impl.RANGES)
@each_width
def test_each_way_to_keep_scores_in_range(mode, width, library, monkeypatch) -> None:
    monkeypatch.setitem(cuda_impl.RANGE, torch.bfloat16, mode)
    _, tables = problem(1, 300, 2, width)
    draw = lambda: problem(1, 300, 2, width)[0]  # noqa: E731
    forward = lambda q, k, v: cuda_impl.forward(q, k, v, *tables, 2, None)[0]  # noqa: E731
    for _ in range(3):
        inputs = [t.bfloat16() for t in draw()]
        check_budget(
            "out", forward(*inputs), truth(tables, 2)(*(t.double() for t in inputs)), plain(tables, 2)(*inputs)
        )
    chosen = {re.search(r"5RangeE(\d)", launch.name)[1] for launch in library.launches if "5Range" in launch.name}
    assert chosen == {str(cuda_impl.RANGES[mode]), str(cuda_impl.RANGES["online"])}


@pytest.mark.parametrize("mode", ["none", "first", "polynomial"])
def test_tiles_that_leave_the_range_are_computed_again(mode, monkeypatch) -> None:
    """The second tile of queries has scores around 100, with keys that are not in the tile which is read first."""
    (q, k, v), tables = problem(2, 300, 1, 64)
    k[:, 100:110] *= 10
    q[:, 192:] *= 20
    inputs = [t.bfloat16() for t in (q, k, v)]
    found, again = {}, {}
    for name in (mode, "online"):
        monkeypatch.setitem(cuda_impl.RANGE, torch.bfloat16, name)
        retry = []
        call = cuda_impl._fwd
        with monkeypatch.context() as patch:
            patch.setattr(cuda_impl, "_fwd", lambda kept=retry, call=call, **f: (call(**f), kept.append(f["retry"])))
            out, lse = cuda_impl.forward(*inputs, *tables, 1, None)
        found[name] = out[:, 192:], lse[..., 192:]
        again[name] = int(retry[0][0])
    assert again == {mode: 2, "online": 0}  # one tile of each pair, each listed once
    for one, other in zip(found[mode], found["online"], strict=True):
        assert torch.equal(one, other)


# Products of values and gradients are not computed in fp64: docs/limits.md.
EXTREME_SCORES = [case for case in EXTREMES if "products" not in case]


@pytest.mark.parametrize("case", EXTREME_SCORES)
@each_width
def test_extreme_scores_have_softmax_in_fp64(width, case) -> None:
    """Where plain torch overflows, nothing but the rounding of the result is allowed."""
    dtype = torch.bfloat16
    inputs, tables, heads = extreme_problem((1, 20, 2, width), dtype, case)
    expected = by_autograd(truth(tables, heads), *(t.double() for t in inputs))
    rival = by_autograd(plain(tables, heads), *inputs)
    names = ("out", "grad_q", "grad_k", "grad_v")
    for name, a, e, p in zip(names, by_autograd(op(tables, heads), *inputs), expected, rival, strict=True):
        fits = e.to(dtype).isfinite()
        assert e.isfinite().all() and torch.equal(a.isfinite(), fits), name
        budget = p if p.isfinite().all() else e.to(dtype)
        check_budget(name, a[fits], e[fits], budget[fits], norms=(2,))


def test_one_wide_query_among_several_tiles() -> None:
    """Forward, the others stay as they are, bit for bit; backward, the other head does."""
    inputs, tables = problem(1, 200, 2, 64)
    inputs = [t.bfloat16() for t in inputs]
    before = value_and_gradients(op(tables, 2), inputs)
    q, k, v = (t.clone() for t in inputs)
    q[0, 197, :64] *= 1e9
    after = value_and_gradients(op(tables, 2), (q, k, v))
    expected = value_and_gradients(truth(tables, 2), [t.double() for t in (q, k, v)])
    others = torch.arange(200) < 192  # another tile
    assert torch.equal(after[0][0, others], before[0][0, others])
    for name, found, same, true in zip(("out", "grad_q", "grad_k", "grad_v"), after, before, expected, strict=True):
        assert torch.equal(found[..., 64:], same[..., 64:]), name
        check_budget(name, found[..., :64], true[..., :64], true[..., :64].bfloat16(), norms=(2,))


# ---- Contracts


def test_tables_may_differ_within_a_channel_pair() -> None:
    """The gradient is the adjoint of whatever the tables say, not only of a rotation."""
    tables = tuple(torch.randn(2, 9, 64))
    draw = lambda: problem(1, 9, 1, 64)[0]  # noqa: E731
    assert_within_budget(truth(tables, 1), op(tables, 1), plain(tables, 1), draw, torch.bfloat16, draws=3)


@each_dtype
def test_strides_are_honoured(dtype, library) -> None:
    """Slices of one projection go as they are; tensors that TMA does not take are copied."""
    inputs, tables = problem(2, 40, 2, 64)
    inputs = [t.to(dtype) for t in inputs]
    expected = value_and_gradients(op(tables, 2), inputs)
    packed = torch.cat(inputs, -1).split(128, -1)
    tokens_first = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in inputs]
    channels_first = [t.mT.contiguous().mT for t in inputs]
    misaligned = [torch.cat([t[..., :1], t], -1)[..., 1:] for t in inputs]
    expanded = [t[:1].expand(2, -1, -1) for t in inputs]
    for views in (packed, tokens_first, channels_first, misaligned):
        torch.testing.assert_close(value_and_gradients(op(tables, 2), views), expected, rtol=0, atol=0)
    copies = value_and_gradients(op(tables, 2), [t.contiguous() for t in expanded])
    torch.testing.assert_close(value_and_gradients(op(tables, 2), expanded), copies, rtol=0, atol=0)
    assert all(_compiled.aligned(t) is t for t in packed)


def test_strided_gradients_are_honoured() -> None:
    inputs, tables = problem(2, 40, 2, 64)
    inputs = [t.bfloat16() for t in inputs]
    one = torch.ones((), dtype=torch.bfloat16)
    cotangents = one.repeat(2, 40, 128), one.expand(2, 40, 128)
    expected, found = (value_and_gradients(op(tables, 2), inputs, g) for g in cotangents)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("valid", [0, 1, 3, 7])
def test_padding_is_skipped(valid) -> None:
    """What lies behind ``num_valid`` may be NaN; it gets zeros, also in memory that was poisoned."""
    inputs, tables = problem(3, 200, 2, 64)
    inputs = [t.bfloat16() for t in inputs]
    some = min(valid, 3)
    one = torch.ones((), dtype=torch.bfloat16)
    expected = value_and_gradients(op(tables, 2), [t[:some] for t in inputs], one.repeat(some, 200, 128))
    for t in inputs:
        t[some:] = torch.nan
    cotangent = one.repeat(3, 200, 128)
    cotangent[some:] = torch.nan
    found = value_and_gradients(op(tables, 2, torch.tensor([valid])), inputs, cotangent)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f[:some], e, rtol=0, atol=0)
        assert (f[some:] == 0).all()


@each_width
def test_same_bits_for_every_grid(width, library, monkeypatch) -> None:
    """1 block, 3 and as many as there are items: a block may work off one item after another."""
    inputs, tables = problem(3, 300, 1, width)
    inputs = [t.bfloat16() for t in inputs]
    results = []
    for multiprocessors in (132, 3, 1):
        with cuda.library("90a", multiprocessors=multiprocessors):
            results.append(value_and_gradients(op(tables, 1), inputs))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("schedule", [1, 2, 3], ids=["warps in reverse", "random", "random again"])
@each_width
def test_same_bits_for_every_order_of_warps(width, schedule, monkeypatch) -> None:
    inputs, tables = problem(2, 300, 1, width)
    inputs = [t.bfloat16() for t in inputs]
    expected = value_and_gradients(op(tables, 1), inputs)
    monkeypatch.setattr(SETTINGS, "schedule", schedule)
    torch.testing.assert_close(value_and_gradients(op(tables, 1), inputs), expected, rtol=0, atol=0)


MAIN = "attention_forward|attention_grad_kv|attention_grad_q"


@each_width
def test_memory_traffic_is_ideal(width, library, monkeypatch) -> None:
    """Shared memory has no bank conflicts. What goes beyond the ideal in global memory are the row sums, 8 bytes of
    neighbouring rows for each thread, and the log-sum-exps."""
    inputs, tables = problem(1, 384, 1, width)
    monkeypatch.setattr(SETTINGS, "counters", True)
    monkeypatch.setattr(SETTINGS, "checks", False)
    value_and_gradients(op(tables, 1), [t.bfloat16() for t in inputs])
    main = [launch for launch in library.launches if re.search(MAIN, launch.name) and launch.totals.multiplications]
    assert len(main) == 3
    for launch in main:
        counters = launch.kernel.counters()
        assert sum(c.wavefronts for c in counters) == sum(c.ideal_wavefronts for c in counters) > 0
        tiles = [c for c in counters if c.opcode.startswith("cp.async.bulk.tensor")]
        assert sum(c.sectors for c in tiles) == sum(c.ideal_sectors for c in tiles) > 0


def test_log_sum_exp() -> None:
    """In powers of 2."""
    (q, k, v), (cos, sin) = problem(2, 140, 2, 64)
    inputs = [t.bfloat16() for t in (q, k, v)]
    _, lse = cuda_impl.forward(*inputs, cos, sin, 2, None)
    factor = torch.complex(cos, sin)[:, None, ::2]
    q, k = (torch.view_as_complex(t.float().unflatten(2, (2, 32, 2))) * factor for t in inputs[:2])
    scores = torch.einsum("pshc,pthc->phst", q, k.conj()).real / 8
    torch.testing.assert_close(lse * math.log(2), scores.logsumexp(-1), rtol=0, atol=2**-8)


@pytest.mark.parametrize("num_valid", [None, torch.tensor([1])], ids=["all", "padded"])
def test_opcheck(num_valid) -> None:
    inputs, tables = problem(2, 9, 2, 64)
    q, k, v = (t.bfloat16() for t in inputs)
    arguments = (q, k, v, *tables, 2, num_valid, "cuda")
    torch.library.opcheck(torch.ops.mova_kernels.expert_attention_fwd.default, arguments)
    out, lse = torch.ops.mova_kernels.expert_attention_fwd(*arguments)
    arguments = (torch.randn_like(out), q, k, v, out, lse, *tables, 2, num_valid, "cuda")
    torch.library.opcheck(torch.ops.mova_kernels.expert_attention_bwd.default, arguments)


def test_what_it_does_not_take_is_refused_with_a_reason() -> None:
    inputs, tables = problem(1, 9, 1, 64)
    with pytest.raises(BackendError, match=r"it takes bfloat16 and float16, not torch\.float32"):
        op(tables, 1)(*inputs)
    narrow, tables = problem(1, 9, 2, 32)
    with pytest.raises(BackendError, match="it takes head widths 64 and 128, not 32"):
        op(tables, 2)(*(t.bfloat16() for t in narrow))


# ---- Errors of the C functions


def fields(**changed: object) -> dict[str, object]:
    """The fields of mk_expert_attention_cuda_fwd for one pair of 9 tokens."""
    table, scratch = torch.zeros(9, 64), torch.zeros(3, dtype=torch.int32)
    names = ("q", "k", "v", "turned_q", "turned_k", "out")
    tensors = {name: torch.zeros(1, 9, 64, dtype=torch.bfloat16) for name in names}
    tensors |= {"cos": table, "sin": table, "num_valid": None, "retry": scratch, "lse": torch.zeros(1, 1, 9)}
    sizes = {"P": 1, "L": 9, "H": 1, "D": 64, "range": 1, "dtype": torch.bfloat16}
    return tensors | sizes | {"device": cuda.CPU, "stream": cuda.STREAM} | changed


WRONG = {
    "head width": ({"D": 96}, "D must be 64 or 128, got 96"),
    "dtype": ({"dtype": torch.float32}, r"dtype must be in \[1, 2\], got 0"),
    "range": ({"range": 4}, r"range must be in \[0, 3\], got 4"),
    "range of fp16": ({"dtype": torch.float16}, "range must be MK_RANGE_ONLINE in fp16, got 1"),
    "too many queries": ({"P": 2**20, "L": 2**12}, "P [*] H [*] L must be at most 2147483647"),
    "misaligned": ({"v": torch.zeros(1, 9, 65, dtype=torch.bfloat16)[..., 1:]}, "v must begin at a multiple of 16"),
}


@pytest.mark.parametrize(("changed", "message"), WRONG.values(), ids=WRONG)
def test_errors_of_the_library(changed, message, library) -> None:
    with pytest.raises(ValueError, match=f"^mk_expert_attention_cuda_fwd: {message}"):
        cuda_impl._fwd(**fields(**changed))
    assert not library.launches


@pytest.mark.parametrize("architecture", ["80", "100"])
def test_other_architectures_have_no_kernel(architecture) -> None:
    with cuda.library(architecture), pytest.raises(RuntimeError, match="cudaErrorNoKernelImageForDevice"):
        cuda_impl._fwd(**fields())
