"""Half a layer over cached keys and values, by the kernels and by torch, against float64."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.mcore import native
from nested_reft_mcore.mcore.decode_native import NativeMath
from nested_reft_mcore.mcore.decode_torch import TorchMath
from nested_reft_mcore.mcore.kv_cache import KeyValueCache, cache_bytes
from nested_reft_mcore.mcore.layer_weights import DecodeShape, LayerWeights
from nested_reft_mcore.rollout.token_pass import PrefixCopy, PromptPiece, TokenPass

LENGTH = 90
needs_kernels = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))
both_paths = pytest.mark.parametrize(
    "math_type", [pytest.param(NativeMath, marks=needs_kernels), TorchMath]
)


def test_kernels_are_there_where_a_compiler_is():
    if shutil.which("g++") is None:
        pytest.skip("no compiler")
    assert native.problem() is None, "build them: python setup.py build_ext --inplace"


@dataclass(frozen=True)
class Case:
    """A layer, a cache with a past, and hidden states."""

    shape: DecodeShape
    layer: LayerWeights
    cache: KeyValueCache
    rotation: tuple[Tensor, Tensor]
    hidden: Tensor


def make_case(
    num_tokens: int,
    *,
    hidden: int = 48,
    groups: int = 2,
    heads: int = 3,
    head_dim: int = 16,
    ffn: int = 64,
    extras: bool = True,
    num_slots: int = 9,
) -> Case:
    """Random numbers; with `extras` a QKV bias and norms over heads."""
    generator = torch.Generator().manual_seed(num_tokens + 7 * hidden + 31 * head_dim)

    def draw(*extents: int, scale: float = 1.0) -> Tensor:
        return torch.randn(extents, generator=generator) * scale

    shape = DecodeShape(hidden, groups, heads, head_dim, ffn, 1e-5)
    width = groups * heads * head_dim
    layer = LayerWeights(
        index=4,
        attention_norm=1 + draw(hidden, scale=0.2),
        qkv=draw(width + 2 * groups * head_dim, hidden, scale=hidden**-0.5),
        qkv_bias=draw(width + 2 * groups * head_dim) if extras else None,
        query_norm=1 + draw(head_dim, scale=0.2) if extras else None,
        key_norm=1 + draw(head_dim, scale=0.2) if extras else None,
        projection=draw(hidden, width, scale=width**-0.5),
        mlp_norm=1 + draw(hidden, scale=0.2),
        gate_and_up=draw(2 * ffn, hidden, scale=hidden**-0.5),
        down=draw(hidden, ffn, scale=ffn**-0.5),
    )
    plan = LayerSkipPlan.full(6)
    cache = KeyValueCache(plan, [4], shape, num_slots, LENGTH, torch.empty(0))
    for tensor in (cache.keys[4], cache.values[4]):
        tensor.copy_(draw(*tensor.shape))
    angles = torch.outer(torch.arange(LENGTH), 100 ** -torch.linspace(0, 1, head_dim // 2))
    return Case(shape, layer, cache, (angles.cos(), angles.sin()), draw(num_tokens, hidden))


def rows(slots: list[int], positions: list[int], width: int = 1, **more: Any) -> TokenPass:
    """A pass of these rows."""
    return TokenPass(
        torch.tensor(slots, dtype=torch.int64),
        torch.tensor(positions, dtype=torch.int64),
        width,
        max(positions) + width if positions else 0,
        **more,
    )


def token_places(tokens: TokenPass) -> tuple[list[int], list[int]]:
    """Slot and position of every token, one by one."""
    slots, positions = [], []
    for slot, position in zip(tokens.slots.tolist(), tokens.positions.tolist(), strict=True):
        slots += [slot] * tokens.width
        positions += range(position, position + tokens.width)
    for piece in tokens.pieces:
        slots += [piece.slot] * piece.length
        positions += range(piece.start, piece.start + piece.length)
    return slots, positions


def expected(case: Case, tokens: TokenPass) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In float64, token by token: hidden after attention, after the MLP, keys and values."""
    layer, shape = case.layer, case.shape
    keys, values = case.cache.keys[4].double(), case.cache.values[4].double()
    slots, positions = token_places(tokens)

    def norm(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        return x / (x.square().mean(-1, keepdim=True) + shape.epsilon).sqrt() * weight.double()

    def rotate(x: Tensor, position: int) -> Tensor:
        cosine, sine = (table[position].double() for table in case.rotation)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)

    hidden = case.hidden.double()
    mixed = norm(hidden, layer.attention_norm) @ layer.qkv.double().T
    if layer.qkv_bias is not None:
        mixed = mixed + layer.qkv_bias.double()
    mixed = mixed.view(-1, shape.groups, shape.heads_per_group + 2, shape.head_dim)
    queries = []
    for t, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        queries.append(rotate(norm(mixed[t, :, :-2], layer.query_norm), position))
        keys[slot, :, position] = rotate(norm(mixed[t, :, -2], layer.key_norm), position)
        values[slot, :, position] = mixed[t, :, -1]
    for copy in tokens.copies:
        for target in copy.targets:
            keys[target, :, : copy.length] = keys[copy.source, :, : copy.length]
            values[target, :, : copy.length] = values[copy.source, :, : copy.length]
    context = []
    for query, slot, position in zip(queries, slots, positions, strict=True):
        scores = query @ keys[slot, :, : position + 1].mT / shape.head_dim**0.5
        context.append((scores.softmax(-1) @ values[slot, :, : position + 1]).flatten())
    attended = hidden + torch.stack(context) @ layer.projection.double().T
    gate, up = (norm(attended, layer.mlp_norm) @ layer.gate_and_up.double().T).chunk(2, dim=-1)
    finished = attended + (gate * gate.sigmoid() * up) @ layer.down.double().T
    return attended, finished, keys, values


def check(case: Case, tokens: TokenPass, math_type: type, tolerance: float = 2e-5) -> Tensor:
    """Both halves equal float64; returns what came out."""
    attended, finished, keys, values = expected(case, tokens)
    math = math_type(case.shape, None)
    math.begin([case.layer])
    current = math.start(case.hidden.clone(), tokens, case.cache, case.rotation)
    current.attention(case.layer)
    torch.testing.assert_close(current.hidden.double(), attended, rtol=0, atol=tolerance)
    torch.testing.assert_close(case.cache.keys[4].double(), keys, rtol=0, atol=tolerance)
    torch.testing.assert_close(case.cache.values[4].double(), values, rtol=0, atol=tolerance)
    current.mlp(case.layer)
    torch.testing.assert_close(current.hidden.double(), finished, rtol=0, atol=tolerance)
    return current.hidden


@both_paths
@pytest.mark.parametrize("num_rows", [1, 3, 8, 16, 21, 24, 40, 65, 200])
def test_any_number_of_rows(math_type: type, num_rows: int):
    case = make_case(num_rows, num_slots=num_rows + 2)
    slots = [(7 * row + 2) % (num_rows + 2) for row in range(num_rows)]
    if len(set(slots)) < num_rows:
        slots = list(range(num_rows))
    check(case, rows(slots, [(13 * row) % LENGTH for row in range(num_rows)]), math_type)


@both_paths
@pytest.mark.parametrize("head_dim", [2, 8, 12, 16, 20, 32, 64, 80, 96, 128])
def test_any_size_of_heads(math_type: type, head_dim: int):
    case = make_case(5, head_dim=head_dim, extras=head_dim % 16 == 0)
    check(case, rows([3, 0, 8, 1, 6], [0, 70, 7, 8, 89]), math_type)


@both_paths
@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden": 37, "ffn": 29, "groups": 1, "heads": 1, "head_dim": 10},
        {"hidden": 130, "ffn": 99, "groups": 3, "heads": 5, "head_dim": 6},
        {"hidden": 576, "ffn": 1536, "groups": 3, "heads": 3, "head_dim": 64},
        {"hidden": 8, "ffn": 7, "groups": 4, "heads": 1, "head_dim": 2},
    ],
    ids=lambda sizes: f"hidden{sizes['hidden']}",
)
def test_any_shape(math_type: type, sizes: dict[str, int]):
    check(make_case(4, **sizes), rows([2, 5, 0, 1], [3, 64, 17, 40]), math_type)


@both_paths
@pytest.mark.parametrize("slots", [[2, 3, 4], [5, 1, 4]], ids=["consecutive", "scattered"])
@pytest.mark.parametrize("positions", [[9, 9, 9], [1, 30, 7]], ids=["level", "ragged"])
@pytest.mark.parametrize("width", [1, 4, 11])
def test_rows_of_several_tokens(
    math_type: type, slots: list[int], positions: list[int], width: int
):
    check(make_case(3 * width), rows(slots, positions, width), math_type)


@both_paths
@pytest.mark.parametrize("width", [1, 2])
def test_pieces_and_copies_beside_rows(math_type: type, width: int):
    """Equal pieces, one that starts later, one that a row and a copy look at in the same pass."""
    tokens = rows(
        *([7, 0, 3, 5], [20, 30, 5, 5], width),
        pieces=(
            PromptPiece(1, 0, 9),
            PromptPiece(3, 0, 5),
            PromptPiece(2, 0, 9),
            PromptPiece(4, 6, 17),
        ),
        copies=(PrefixCopy(3, (5, 6), 5),),
    )
    case = make_case(tokens.num_tokens)
    check(case, tokens, math_type)


@both_paths
def test_pieces_alone(math_type: type):
    check(make_case(75), rows([], [], pieces=(PromptPiece(8, 2, 75),)), math_type)


@both_paths
def test_pieces_write_keys_and_no_more_once_rows_alone_matter(math_type: type):
    tokens = rows([7, 0], [20, 11], pieces=(PromptPiece(1, 0, 9),))
    case = make_case(tokens.num_tokens)
    _, finished, keys, _ = expected(case, tokens)
    math = math_type(case.shape, None)
    math.begin([case.layer])
    current = math.start(case.hidden.clone(), tokens, case.cache, case.rotation)
    current.keep_rows()
    current.attention(case.layer)
    current.mlp(case.layer)
    torch.testing.assert_close(current.hidden[:2].double(), finished[:2], rtol=0, atol=2e-5)
    torch.testing.assert_close(current.hidden[2:], case.hidden[2:], rtol=0, atol=0)
    torch.testing.assert_close(case.cache.keys[4].double(), keys, rtol=0, atol=2e-5)


@both_paths
def test_shards_are_summed_before_they_join_the_stream(math_type: type):
    """Each half's share goes through the sum once; here a second rank would have found as much."""
    case = make_case(3)
    tokens = rows([4, 0, 2], [10, 0, 33])
    attended, _, _, _ = expected(case, tokens)
    math = math_type(case.shape, lambda partial: partial.mul_(2))
    math.begin([case.layer])
    current = math.start(case.hidden.clone(), tokens, case.cache, case.rotation)
    current.attention(case.layer)
    wanted = case.hidden + 2 * (attended - case.hidden)
    torch.testing.assert_close(current.hidden.double(), wanted, rtol=0, atol=4e-5)


@both_paths
@pytest.mark.parametrize(("num_tokens", "features"), [(1, 500), (3, 7), (70, 193), (16, 4608)])
def test_logits(math_type: type, num_tokens: int, features: int):
    case = make_case(num_tokens, hidden=45)
    weight = torch.randn(features, 45)
    found = math_type(case.shape, None).logits(case.hidden, case.layer.mlp_norm, weight)
    hidden = case.hidden.double()
    scale = (hidden.square().mean(-1, keepdim=True) + case.shape.epsilon).sqrt()
    wanted = (hidden / scale * case.layer.mlp_norm.double()) @ weight.double().T
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=5e-5)


@both_paths
def test_large_numbers_and_large_scores(math_type: type):
    """Scores of some hundreds: weights without the largest one taken off would overflow."""
    case = make_case(4, extras=False)
    case.cache.keys[4].mul_(60)
    case.layer.gate_and_up.mul_(40)
    check(case, rows([1, 2, 3, 4], [50, 3, 88, 31]), math_type, tolerance=1e-2)


@needs_kernels
def test_kernels_read_no_place_beyond_a_token_s_own():
    tokens = rows([6, 1, 4], [9, 0, 70], pieces=(PromptPiece(2, 3, 8),))
    case = make_case(tokens.num_tokens)
    clean = check(case, tokens, NativeMath)
    slots, positions = token_places(tokens)
    last = dict(zip(slots, positions, strict=True))
    for tensor in (case.cache.keys[4], case.cache.values[4]):
        for slot in range(tensor.shape[0]):
            tensor[slot, :, last.get(slot, -1) + 1 :] = torch.nan
    math = NativeMath(case.shape, None)
    math.begin([case.layer])
    current = math.start(case.hidden.clone(), tokens, case.cache, case.rotation)
    current.attention(case.layer)
    current.mlp(case.layer)
    assert torch.equal(current.hidden, clean)


@both_paths
def test_cleared_slots_forget_nan(math_type: type):
    case, tokens = make_case(3), rows([6, 1, 4], [9, 0, 70])
    for tensor in (case.cache.keys[4], case.cache.values[4]):
        tensor[1] = torch.nan
    case.cache.clear([1])
    assert case.cache.keys[4][0].abs().min() > 0
    check(case, tokens, math_type)


@both_paths
def test_nan_stays_in_its_row_and_shows(math_type: type):
    case, tokens = make_case(3), rows([6, 1, 4], [9, 0, 70])
    case.cache.keys[4][6, 0, 2, 1] = torch.nan
    math = math_type(case.shape, None)
    math.begin([case.layer])
    current = math.start(case.hidden.clone(), tokens, case.cache, case.rotation)
    current.attention(case.layer)
    current.mlp(case.layer)
    assert current.hidden[0].isnan().all()
    assert not current.hidden[1:].isnan().any()


@needs_kernels
def test_company_changes_no_bit():
    """A token gets the same alone and in any company, in a row, a wide row or a piece."""
    case = make_case(30)
    math = NativeMath(case.shape, None)
    math.begin([case.layer])

    def run(hidden: Tensor, tokens: TokenPass) -> Tensor:
        current = math.start(hidden.clone(), tokens, case.cache, case.rotation)
        current.attention(case.layer)
        current.mlp(case.layer)
        return math.logits(current.hidden, case.layer.mlp_norm, case.layer.gate_and_up)

    together = run(case.hidden, rows([], [], pieces=(PromptPiece(3, 5, 30),)))
    for t in range(30):
        alone = run(case.hidden[t : t + 1], rows([3], [5 + t]))
        assert torch.equal(alone[0], together[t]), t
    assert torch.equal(run(case.hidden, rows([3, 3, 3], [5, 15, 25], 10)), together)


@both_paths
@pytest.mark.parametrize(
    "tokens",
    [
        rows([1], [LENGTH]),
        rows([1], [LENGTH - 2], 3),
        rows([], [], pieces=(PromptPiece(0, 80, 11),)),
    ],
    ids=["row", "wide row", "piece"],
)
def test_a_pass_beyond_the_cache_is_refused(math_type: type, tokens: TokenPass):
    case = make_case(tokens.num_tokens)
    with pytest.raises(ValueError, match="the pass goes to"):
        math_type(case.shape, None).start(case.hidden, tokens, case.cache, case.rotation)


@needs_kernels
@pytest.mark.parametrize("slot", [-1, 9])
def test_kernels_write_to_no_slot_that_is_not_there(slot: int):
    case = make_case(1)
    for tokens in (rows([slot], [3]), rows([0], [3], copies=(PrefixCopy(0, (slot,), 2),))):
        with pytest.raises(ValueError, match="has 9 slots of 90 positions"):
            NativeMath(case.shape, None).start(case.hidden, tokens, case.cache, case.rotation)


@needs_kernels
def test_kernels_refuse_weights_that_they_cannot_read():
    case = make_case(1)
    math = NativeMath(case.shape, None)
    with pytest.raises(ValueError, match="contiguous float32"):
        math.logits(case.hidden, case.layer.mlp_norm, torch.randn(48, 5).T)
    with pytest.raises(ValueError, match="contiguous float32"):
        math.logits(case.hidden, case.layer.mlp_norm, torch.randn(5, 48).bfloat16())


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_number_of_threads_changes_no_bit(threads: int):
    tokens = rows([6, 1, 4], [9, 0, 70], pieces=(PromptPiece(2, 3, 77),))
    case = make_case(tokens.num_tokens)
    clean, before = check(case, tokens, NativeMath), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(check(case, tokens, NativeMath), clean)
    finally:
        torch.set_num_threads(before)


def test_bytes_of_a_cache_are_those_of_the_formula():
    shape = DecodeShape(48, 2, 3, 16, 64, 1e-5)
    plan = LayerSkipPlan.parse("1,2.attention,3.mlp", 6)
    for dtype in (torch.float32, torch.bfloat16):
        cache = KeyValueCache(plan, range(5), shape, 7, 11, torch.empty(0, dtype=dtype))
        assert set(cache.keys) == set(cache.values) == {0, 3, 4}
        found = cache_bytes(plan, range(5), shape, 7, 11, dtype)
        assert found == cache.num_bytes == 2 * 3 * 7 * 2 * 11 * 16 * dtype.itemsize
        assert all(not tensor.any() for tensor in (*cache.keys.values(), *cache.values.values()))
