"""The blocked backend as torch's registry sees it: opcheck, compile, vmap, autocast, memory, threads, and refusals."""

import threading
from functools import partial

import pytest
import torch
import torch._dynamo
from torch.autograd import forward_ad
from torch.library import opcheck

from twicing import explain_backend, twicing_attention
from twicing.ops.blocked import plan, scratch
from twicing.ops.blocked.operator import blocked_backward, blocked_forward
from twicing.ops.blocked.walk import Walk
from twicing.ops.blocked.weights import Heads
from twicing.testing import make_inputs, relative_rms

call = partial(twicing_attention, backend="blocked")
N = 9


@pytest.fixture
def inputs(generator):
    return make_inputs((2, 4, N, 8), generator=generator)


def bool_mask():
    allowed = torch.rand(N, N, generator=torch.Generator().manual_seed(1)) > 0.4
    allowed[2] = False
    return allowed


# Name -> mask, gain, seed, dropout_p, is_causal: arguments of the operator.
OPERATOR_CALLS = {
    "plain": (None, torch.ones(1), None, 0.0, False),
    "causal-gain-per-head": (None, torch.linspace(0, 1, 4), None, 0.0, True),
    "bool-mask": (bool_mask()[None, None], torch.ones(1), None, 0.0, False),
    "float-mask": (torch.arange(2.0 * N * N).sin().view(2, 1, N, N), torch.ones(1), None, 0.0, False),
    "dropout": (None, torch.ones(1), torch.tensor(7), 0.3, True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPERATOR_CALLS)
def test_opcheck(name, dtype, inputs):
    mask, gain, *options = OPERATOR_CALLS[name]
    needs_d_mask = mask is not None and mask.is_floating_point()
    leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    mask = mask.detach().to(dtype, copy=True).requires_grad_() if needs_d_mask else mask
    arguments = (*leaves, mask, gain.clone().requires_grad_(), *options, 0.3)
    opcheck(blocked_forward, (*arguments, True))
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    opcheck(blocked_forward, (*plain, False))
    saved = blocked_forward(*plain, True)
    opcheck(blocked_backward, (torch.randn_like(saved[0]), *saved, *plain, True, needs_d_mask))


@pytest.mark.parametrize("is_training", [False, True])
def test_a_compiler_is_told_how_the_output_lies_in_memory(is_training):
    """With heads that one projection made, the heads of a token side by side."""
    packed = torch.randn(2, N, 3, 4, 8).permute(2, 0, 3, 1, 4)
    arguments = (*packed, None, torch.ones(1), None, 0.0, False, 0.3, is_training)
    opcheck(blocked_forward, arguments, test_utils="test_faketensor")


CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool-mask": {"attn_mask": bool_mask()},
    "float-mask": {"attn_mask": torch.zeros(N, N).masked_fill(~bool_mask(), float("-inf"))},
    "gain-per-head": {"gain": torch.linspace(0, 1, 4)},
    "gain": {"gain": 0.5},
    "dropout": {"dropout_p": 0.2},
}


@pytest.mark.parametrize("name", CALLS)
def test_it_compiles_to_one_graph_with_the_same_output_and_gradients(name, inputs):
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    options = {
        key: value.clone().requires_grad_() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in CALLS[name].items()
    }
    learnt = [value for value in options.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    leaves = [tensor.requires_grad_() for tensor in inputs] + learnt
    torch.manual_seed(1)
    output = compiled(*inputs, **options)
    torch.manual_seed(1)
    expected = call(*inputs, **options)
    torch.testing.assert_close(output, expected)
    upstream = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad(x, leaves, upstream) for x in (output, expected))
    torch.testing.assert_close(found, wanted)
    torch._dynamo.reset()


def test_a_compiled_call_with_another_length_compiles_once_more_and_then_no_more(generator):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for tokens in (9, 10, 11, 33):
        inputs = make_inputs((2, 4, tokens, 8), generator=generator)
        torch.testing.assert_close(compiled(*inputs), call(*inputs))
    assert counter.frame_count == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=str)
def test_gradcheck_of_every_input(options, generator):
    leaves = [x.requires_grad_() for x in make_inputs((1, 2, 5, 3), generator=generator, dtype=torch.float64)]
    gain = torch.rand(2, dtype=torch.float64, requires_grad=True)
    bias = [] if options else [torch.randn(5, 5, dtype=torch.float64, requires_grad=True)]

    def function(q, k, v, gain, bias=None):
        return call(q, k, v, bias, gain=gain, **options)

    assert torch.autograd.gradcheck(function, (*leaves, gain, *bias), check_batched_grad=True)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"gain": 0.5}], ids=str)
def test_vmap_is_a_loop(options, inputs):
    looped = torch.stack([call(*one, **options) for one in zip(*inputs, strict=True)])
    torch.testing.assert_close(torch.func.vmap(partial(call, **options))(*inputs), looped)


def test_vmap_over_queries_masks_and_gains_and_its_gradient(inputs):
    q, k, v = (tensor.requires_grad_() for tensor in inputs)
    masks, gains = torch.stack([bool_mask(), ~bool_mask()]), torch.rand(2, 4)

    def one(q, mask, gain):
        return call(q, k[0], v[0], mask, gain=gain)

    looped = torch.stack([one(*each) for each in zip(q, masks, gains, strict=True)])
    mapped = torch.func.vmap(one)(q, masks, gains)
    torch.testing.assert_close(mapped, looped)
    found, wanted = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (mapped, looped))
    torch.testing.assert_close(found, wanted)


def test_a_second_derivative_is_refused_in_a_sentence(inputs):
    q, k, v = (tensor.requires_grad_() for tensor in inputs)
    (d_query,) = torch.autograd.grad(call(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"first derivative only .* Use backend='reference'"):
        d_query.sum().backward()


def refused_calls():
    q, k, v = make_inputs((2, 4, N, 8), generator=torch.Generator().manual_seed(0))
    meta = [tensor.to("meta") for tensor in (q, k, v)]
    tiny = [tensor.to(torch.float8_e4m3fn) for tensor in (q, k, v)]
    return {
        "order": (lambda: call(q, k, v, order=3), r"it has order 2 only, and the order is 3\. Use backend='sdpa'"),
        "device": (lambda: call(*meta), r"it works on the CPU, and the query is on meta\. Use backend='sdpa'"),
        "dtype": (lambda: call(*tiny), r"it computes in torch.float32, .*, and the query is torch.float8_e4m3fn"),
        "grad": (lambda: torch.func.grad(lambda q: call(q, k, v).sum())(q), r"torch.func.grad and its kin cannot"),
        "jvp": (lambda: torch.func.jvp(lambda q: call(q, k, v), (q,), (q,)), r"torch.func.grad and its kin cannot"),
        "vmap-of-grad": (
            lambda: torch.func.vmap(torch.func.grad(lambda q: call(q, k[0], v[0]).sum()))(q),
            r"torch.func.grad and its kin cannot differentiate an operator with its own backward\. Use backend='sdpa'",
        ),
    }


# The first forward-mode derivative in a process makes torch script its own functions.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_tangents_are_refused_and_not_dropped(inputs):
    """ "auto" leaves them to SDPA, which speaks for itself."""
    q, k, v = inputs
    with forward_ad.dual_level():
        duals = forward_ad.make_dual(q, torch.ones_like(q)), forward_ad.make_dual(v, torch.ones_like(v))
        for query, value in ((duals[0], v), (q, duals[1])):
            with pytest.raises(ValueError, match=r"it has no forward-mode derivative\. Use backend='reference'\."):
                call(query, k, value)
        long = forward_ad.make_dual(torch.ones(8, 256, 16), torch.ones(8, 256, 16))
        assert "takes 'sdpa'" in explain_backend(long, long, long)
    assert call(*inputs).isfinite().all()


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", refused_calls())
def test_refused_with_a_sentence(name):
    run, sentence = refused_calls()[name]
    with pytest.raises(ValueError, match=f"backend='blocked' cannot serve this call: {sentence}"):
        run()


def test_explain_backend_knows_it(inputs):
    assert "'blocked', as asked for: on the CPU: a few heads at a time" in explain_backend(*inputs, backend="blocked")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_what_comes_in_and_not_what_is_summed(dtype, inputs):
    leaves = [tensor.requires_grad_() for tensor in inputs]
    with torch.autocast("cpu", dtype):
        output = call(*leaves)
        gradients = torch.autograd.grad(output.float().square().sum(), leaves)
    cast = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    expected = call(*cast)
    assert output.dtype == dtype
    assert torch.equal(output, expected)
    exact = torch.autograd.grad(expected.float().square().sum(), cast)
    assert all(torch.equal(found, wanted.float()) for found, wanted in zip(gradients, exact, strict=True))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 0.1}], ids=str)
def test_nothing_of_size_n_by_n_is_saved(options, generator):
    leaves = [tensor.requires_grad_() for tensor in make_inputs((1, 2, 512, 4), generator=generator)]
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(*leaves, **options).sum().backward()
    assert max(sizes) <= leaves[0].numel()


def test_threads_do_not_share_their_scratch(inputs):
    """Each thread computes something else, over and over, and gets its own result every time."""
    problems = [[tensor + shift for tensor in inputs] for shift in range(4)]
    expected = [call(*problem) for problem in problems]
    wrong = []

    def work(problem, result):
        for _ in range(30):
            if not torch.equal(call(*problem), result):
                wrong.append(problem)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(problems, expected, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_scratch_made_in_inference_mode_serves_outside_of_it(inputs):
    results = []

    def work():
        with torch.inference_mode():
            results.append(call(*inputs).clone())
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = call(*leaves)
        output.sum().backward()
        results.append(output.detach())

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert torch.equal(*results)


def test_scratch_lends_no_memory_twice_and_no_more_than_it_has():
    room = scratch.Scratch(torch.float64)
    taken = [room.take(3, 5), room.take(7), room.take(0), room.take(1, 2, 3)]
    # In tests, where algorithms are deterministic.
    assert all(tensor.isnan().all() for tensor in taken)
    for number, tensor in enumerate(taken):
        tensor.fill_(number)
    assert [float(tensor.sum()) for tensor in taken] == [0.0, 7.0, 0.0, 18.0]
    beyond = room.take(scratch.KEPT_BYTES // 8)
    assert beyond.untyped_storage().data_ptr() != room.memory.untyped_storage().data_ptr()


@pytest.mark.parametrize("has_dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 197, 256, 300, 767, 1024, 2048, 4096, 5000, 20_001, 100_000])
def test_plans_cover_every_row_or_column_once_within_their_memory(tokens, is_causal, direction, has_dropout):
    made = plan.plan(24, tokens, 4, is_causal=is_causal, direction=direction, has_dropout=has_dropout)
    assert [row for block in made.blocks for row in range(block.start, block.stop)] == list(range(tokens))
    threads, row_bytes = torch.get_num_threads(), 4 * tokens
    sides = plan.BOX_BYTES[direction], plan.PART_BYTES[direction] + plan.LEAST_ROWS * row_bytes
    least = plan.LEAST_COLUMNS * 2 * row_bytes if has_dropout or direction == "backward" else 0
    assert 4 * made.block_size <= threads * max(*sides, plan.WHOLE_BYTES[direction], least)
    is_whole = tokens <= (256 if is_causal else {"forward": 2048, "backward": 1024}[direction])
    is_short = tokens < 2 * plan.LEAST_COLUMNS and direction == "backward"
    assert (len(made.blocks) == 1) == (is_whole or is_short)
    # Buffers are no larger than the call.
    few = plan.plan(1, tokens, 4, is_causal=is_causal, direction=direction, has_dropout=has_dropout)
    assert (few.heads, few.length <= tokens) == (1, True)
    # On one thread, heads are put together only where the longest block of them all is small.
    assert made.heads == 1 or 4 * made.block_size <= plan.BOX_BYTES[direction]


def test_blocks_are_as_long_as_planned_but_for_the_last():
    """Which is longer where there would be too little left: of 767 columns no 255 are cut off."""

    def lengths(tokens, direction, *, is_causal, element_size=4):
        made = plan.plan(1, tokens, element_size, is_causal=is_causal, direction=direction)
        return [block.stop - block.start for block in made.blocks]

    assert lengths(511, "backward", is_causal=True) == [511]
    assert lengths(512, "backward", is_causal=True) == [256, 256]
    assert lengths(767, "backward", is_causal=True) == [256, 511]
    assert lengths(768, "backward", is_causal=True) == [256, 256, 256]
    assert lengths(1024, "forward", is_causal=True) == [128] * 8
    assert lengths(4096, "forward", is_causal=True) == [256] * 16
    assert lengths(2048, "backward", is_causal=False) == [512] * 4
    assert lengths(4096, "forward", is_causal=False) == [512] * 8
    # Numbers of 8 bytes take twice the room.
    assert lengths(2048, "forward", is_causal=False) == [2048]
    assert lengths(2048, "forward", is_causal=False, element_size=8) == [512] * 4


@pytest.mark.parametrize(("is_causal", "made"), [(False, 4 * 4 + 3 + 2 + 1), (True, 4 + 3 + 2 + 1)])
def test_no_more_of_a_is_made_than_the_sums_need(is_causal, made, monkeypatch, generator):
    """Of 64 tokens, in 4 x 4 squares: what lies beyond the diagonal twice; causal, only what lies up to it."""
    monkeypatch.setattr(plan, "PART_BYTES", {"forward": 1, "backward": 1})
    monkeypatch.setattr(plan, "WHOLE_BYTES", {"forward": 0, "backward": 0})
    monkeypatch.setattr(plan, "LEAST_COLUMNS", 16)
    sizes, weights = [], Heads.weights

    def counted(heads, buffer, rows, columns, shift):
        sizes.append((rows.stop - rows.start) * (columns.stop - columns.start) / 16**2)
        return weights(heads, buffer, rows, columns, shift)

    monkeypatch.setattr(Heads, "weights", counted)
    leaves = [tensor.requires_grad_() for tensor in make_inputs((1, 1, 64, 8), generator=generator)]
    output = call(*leaves, is_causal=is_causal)
    assert sum(sizes) == made
    sizes.clear()
    output.sum().backward()
    assert sum(sizes) == made


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("tokens", [257, 512, 767, 2049, 4096, 5000, 20_001])
def test_no_block_of_a_backward_is_narrow_and_dropouts_squares_are_not_cut(tokens, is_causal):
    """Narrow products are rounded otherwise than the forward's were."""
    for has_dropout in (False, True):
        for direction in ("forward", "backward"):
            blocks = plan.plan(8, tokens, 4, is_causal=is_causal, direction=direction, has_dropout=has_dropout).blocks
            if direction == "backward":
                assert min(block.stop - block.start for block in blocks) >= plan.LEAST_COLUMNS
            if has_dropout:
                assert all(block.start % plan.DROPOUT_TILE == 0 for block in blocks)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_no_block_of_a_is_made_of_fewer_columns_than_are_rounded_alike(is_causal, monkeypatch, generator):
    """However few of them its product with R takes in: of the first rows in causal order, of the last ones without."""
    monkeypatch.setattr(plan, "PART_BYTES", {"forward": 1, "backward": 1})
    monkeypatch.setattr(plan, "WHOLE_BYTES", {"forward": 0, "backward": 0})
    made, weights = [], Heads.weights

    def noted(heads, buffer, rows, columns, shift):
        made.append(columns)
        return weights(heads, buffer, rows, columns, shift)

    monkeypatch.setattr(Heads, "weights", noted)
    leaves = [tensor.requires_grad_() for tensor in make_inputs((1, 1, 520, 4), generator=generator)]
    call(*leaves, is_causal=is_causal).sum().backward()
    assert len(made) > 32
    assert min(columns.stop - columns.start for columns in made) == plan.LEAST_COLUMNS


@pytest.mark.parametrize("together", [1, 2, 3, 5, 7, 100])
def test_boxes_cover_every_head_once(together):
    made = list(plan.boxes(4, 5, together))
    assert [head for box in made for head in range(box.flat.start, box.flat.stop)] == list(range(20))
    assert max(len(box) for box in made) <= together
    for box in made:
        batch, heads = box.shape
        assert batch * heads == len(box)
        assert box.flat.start == box.batch.start * 5 + box.heads.start


@pytest.mark.parametrize("shape", [(2, 3, 0, 4), (0, 3, 5, 4), (2, 0, 5, 4)], ids=["tokens", "batch", "heads"])
def test_empty_calls(shape):
    q = torch.randn(shape, requires_grad=True)
    output = call(q, q, q)
    assert output.shape == shape
    output.sum().backward()
    assert q.grad.shape == shape


@pytest.mark.parametrize("shape", [(2, 4, 0, 8), (0, 4, 5, 8)], ids=["tokens", "batch"])
def test_empty_calls_with_grouped_heads(shape):
    q, k = torch.randn(shape, requires_grad=True), torch.randn(shape)[:, :2].requires_grad_()
    call(q, k, k, enable_gqa=True).sum().backward()
    assert k.grad.shape == k.shape


def test_heads_of_no_width_average():
    """Without a query and a key every score is 0, and there may be no value either."""
    nothing, v = torch.randn(2, 3, 5, 0), torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(call(nothing, nothing, v), v.mean(-2, keepdim=True).expand_as(v))
    assert call(v, v, nothing).shape == nothing.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("together", [1, 4, 8])
def test_what_a_box_is_computed_from_lies_together(together, dtype):
    """Of heads that lie apart, as those of one projection do, every product over a block would gather again.

    Copies lie in memory that is kept, where they give no work to the allocator of a training step.
    """
    query = torch.randn(2, N, 4, 8).to(dtype).transpose(1, 2)
    walk = Walk(query, query, query, None, torch.ones(1), None, 0.0, False, 1.0, "forward")
    for box in plan.boxes(2, 4, together):
        part = walk.part("query", query, box)
        assert part.is_contiguous()
        assert torch.equal(part, query.flatten(0, 1)[box.flat].float())
        is_copied = dtype != torch.float32 or not query[box.batch, box.heads].is_contiguous()
        kept = walk.scratch.memory.untyped_storage().data_ptr()
        assert (part.untyped_storage().data_ptr() == kept) == is_copied
        if not is_copied:
            assert part.untyped_storage().data_ptr() == query.untyped_storage().data_ptr()


def test_leading_axes(generator):
    """None, one and three axes before the tokens, broadcast ones, and masks with as many."""
    q, k, v = make_inputs((2, 3, 2, N, 8), value_width=4, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 1, N, N, generator=generator) > 0.3
    cases = [
        ((q, k, v), mask),
        ((q, k, v), mask[:1]),
        ((q, k[0, 0], v[:, :1]), None),
        ((q[:, :, :1], k, v), mask[0, 0]),
        ((q[0, 0, 0], k[0, 0, 0], v[0, 0, 0]), mask[0, 0]),
        ((q[0, 0], k[0, 0, 0], v[0, 0]), mask[0]),
    ]
    for inputs, attn_mask in cases:
        expected = twicing_attention(*inputs, attn_mask, backend="reference")
        output = call(*inputs, attn_mask)
        assert output.shape == expected.shape
        assert relative_rms(output, expected) < 1e-14


def test_the_output_lies_in_memory_as_that_of_sdpa():
    """Joining the heads of a model that splits them from one projection copies nothing."""
    packed = torch.randn(2, 9, 3, 4, 8).permute(2, 0, 3, 1, 4)
    for query in (packed[0], packed[0].contiguous(), packed[0].transpose(1, 2).contiguous().transpose(1, 2)):
        standard = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        assert call(query, query, query).stride() == standard.stride()
