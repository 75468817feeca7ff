"""Any tensor that torch's optimizers could use as a gradient gives torch's result here, or an error on all ranks."""

import io
import itertools
import threading

import numpy as np
import pytest
from conftest import COMM

import extrapcomm as xc
from extrapcomm import gradients as gradients_module
from extrapcomm.odd_gradients import Reader

torch = pytest.importorskip("torch")

KINDS = {
    "SGD": (xc.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "Adam": (xc.Adam, torch.optim.Adam, {"lr": 0.01}),
    "AdamW": (xc.AdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}
SHAPES = [(3, 4), (3, 4), (5, 5), (2, 3, 2, 2), (), (7,), (0, 3)]
MODES = ("copy", "hook", "view")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def some(shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def parameters(dtype):
    params = [torch.nn.Parameter(some(shape, seed, dtype)) for seed, shape in enumerate(SHAPES)]
    params[3].data = params[3].data.contiguous(memory_format=torch.channels_last)
    return params


def backward(params, step, **options):
    """Gradients that are not alike in any two places."""
    terms = [(p * some(p.shape, 100 * step + i, p.dtype)).sum() for i, p in enumerate(params)]
    torch.stack(terms).sum().backward(**options)


def each(change):
    """A case that makes every gradient another one."""

    def case(params, step):
        for param in params:
            param.grad = change(param.grad)

    return case


def each_data(change):
    """A case that gives every gradient other data, which torch does not check."""

    def case(params, step):
        for param in params:
            param.grad.data = change(param.grad.data)

    return case


def swapped(params, step):
    params[0].grad, params[1].grad = params[1].grad, params[0].grad


def swapped_data(params, step):
    first, second = params[0].grad.data, params[1].grad.data
    params[0].grad.data, params[1].grad.data = second, first


def in_a_circle(params, step):
    swapped(params, step)
    params[0].grad, params[1].grad = params[1].grad.view(3, 4), params[0].grad[:]
    params[5].grad = params[2].grad.flatten()[1:8]


def one_for_two(params, step):
    params[1].grad = params[0].grad


def in_the_place_of_another(params, step):
    params[1].grad = params[0].grad
    params[0].grad = some((3, 4), step + 7, params[0].dtype)


def transposed(params, step):
    params[2].grad = params[2].grad.t()
    params[0].grad = params[0].grad.as_strided((3, 4), (1, 3))


def overlapping_views(params, step):
    buffer = some((40,), step, params[0].dtype)
    params[0].grad = buffer.as_strided((3, 4), (1, 1))
    params[1].grad = buffer.as_strided((3, 4), (1, 2), 3)
    params[2].grad = buffer[1:26].view(5, 5)


def parts_of_one_buffer(params, step):
    buffer = torch.cat([param.grad.flatten() for param in params])
    for param, part in zip(params, buffer.split([param.numel() for param in params]), strict=True):
        param.grad = part.view(param.shape)
    buffer.mul_(0.5)


def shifted(params, step):
    """Each reads what lies one element further in the same gradient, and the last wraps around."""
    for param in (params[0], params[2]):
        param.grad = param.grad.flatten().roll(-1).view(param.shape)
    params[5].grad = params[5].grad.as_strided((7,), (0,), params[5].grad.storage_offset() + 3)


def weights(params, step):
    params[0].grad = params[1].detach()
    params[2].grad = params[2].data


class Marked(torch.Tensor):
    """A subclass that behaves as a tensor does."""


CASES = {
    "float64": each_data(lambda g: g.double()),
    "float32": each_data(lambda g: g.float()),
    "float16": each_data(lambda g: g.half()),
    "bfloat16": each_data(lambda g: g.bfloat16()),
    "integers": each_data(lambda g: (3 * g).int()),
    "bits": each_data(lambda g: g > 0),
    "negated": each(torch._neg_view),
    "negated data": each_data(torch._neg_view),
    "zero tensors": each(lambda g: torch._efficientzerotensor(g.shape, dtype=g.dtype)),
    "expanded": each(lambda g: g.flatten()[:1].sum().expand(g.shape)),
    "channels last": lambda params, step: setattr(
        params[3], "grad", params[3].grad.contiguous(memory_format=torch.channels_last)
    ),
    "contiguous": each(lambda g: g.contiguous().clone()),
    "strided": each(lambda g: torch.stack([g, g + 1], dim=-1)[..., 0]),
    "subclass": each(lambda g: g.as_subclass(Marked)),
    "parameters": each(torch.nn.Parameter),
    "part of a graph": each(lambda g: torch.nn.Parameter(g) * 2),
    "swapped": swapped,
    "swapped data": swapped_data,
    "in a circle": in_a_circle,
    "one for two": one_for_two,
    "in the place of another": in_the_place_of_another,
    "transposed": transposed,
    "overlapping views": overlapping_views,
    "parts of one buffer": parts_of_one_buffer,
    "shifted": shifted,
    "weights": weights,
    "none": lambda params, step: setattr(params[step % 6], "grad", None),
}


# One memory for several gradients stays so until somebody drops them: torch zeroes and adds there, wherever it is.
SHARING = ["in a circle", "one for two"]


class Twin:
    """torch's optimizer on master weights, with gradients of the parameters' type.

    A case runs on the twin's own parameters, so torch itself says which gradients it makes.
    """

    def __init__(self, dtype, kind):
        self.params = parameters(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.masters = [torch.nn.Parameter(p.detach().to(wide)) for p in self.params]
        _, optimizer, options = KINDS[kind]
        self.opt = optimizer(self.masters, **options)

    def zero_grad(self, set_to_none=True):
        for param in self.params:
            if param.grad is None:
                continue
            if set_to_none:
                param.grad = None
            else:
                param.grad = torch.zeros_like(param)

    def step(self):
        for param, master in zip(self.params, self.masters, strict=True):
            grad = param.grad
            if grad is not None:
                grad = torch.empty_like(param).copy_(grad.detach()).to(master.dtype).detach()
            master.grad = grad
        self.opt.step()
        with torch.no_grad():
            for param, master in zip(self.params, self.masters, strict=True):
                param.copy_(master)


@pytest.fixture
def without_table(monkeypatch):
    """As with a torch that has no table of DLPack's functions."""
    monkeypatch.setattr(gradients_module, "reader_for", lambda _, *arguments: Reader(*arguments))


def train(params, opt, twin, case, step, workers):
    for v in range(workers):
        with opt.worker(v):
            backward(params, step)
            case(params, step)
    backward(twin.params, step)
    case(twin.params, step)
    opt.step()
    twin.step()


def assert_like(params, opt, twin):
    for i, (param, master) in enumerate(zip(params, twin.masters, strict=True)):
        torch.testing.assert_close(opt.master(i), master.detach(), rtol=2e-5, atol=2e-6, check_stride=False)
        assert torch.equal(param.detach(), opt.master(i).to(param.dtype))


def made(kind, dtype, mode, world):
    params = parameters(dtype)
    ours, _, options = KINDS[kind]
    return params, ours(params, **options, gradients=mode, world=world), Twin(dtype, kind)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_gradient_counts_as_in_torch(worlds, case, mode):
    params, opt, twin = made("SGD", torch.float32, mode, worlds(2))
    for step in range(3):
        opt.zero_grad(True)
        twin.zero_grad(True)
        train(params, opt, twin, CASES[case], step, 2)
        assert_like(params, opt, twin)
    opt.close()


@pytest.mark.parametrize("case", CASES)
def test_so_it_does_with_an_older_torch(worlds, without_table, case):
    test_every_kind_of_gradient_counts_as_in_torch(worlds, case, "copy")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_so_it_does_one_kind_after_the_other(worlds, kind, dtype, mode, workers):
    params, opt, twin = made(kind, DTYPES[dtype], mode, worlds(workers))
    for step, case in enumerate(CASES):
        set_to_none = case in SHARING or step % 3 == 0
        opt.zero_grad(set_to_none)
        twin.zero_grad(set_to_none)
        train(params, opt, twin, CASES[case], step, workers)
        assert_like(params, opt, twin)
    opt.close()


KEPT = ["swapped", "swapped data", "transposed", "negated", "expanded", "float64", "parts of one buffer"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", KEPT)
def test_gradients_that_are_not_dropped_count_again_in_the_next_step(worlds, case, mode):
    params, opt, twin = made("SGD", torch.float32, mode, worlds(1))
    for step in range(2):
        opt.zero_grad(False)
        twin.zero_grad(False)
        backward(params, step)
        backward(twin.params, step)
        CASES[case](params, step)
        CASES[case](twin.params, step)
        for _ in range(3):
            opt.step()
            twin.step()
            assert_like(params, opt, twin)
    opt.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "case", ["swapped", "one for two", "in the place of another", "parts of one buffer", "transposed"]
)
def test_autograd_adds_to_gradients_wherever_they_lie(worlds, case, mode):
    if case == "transposed" and mode != "copy":
        pytest.skip("autograd gives a gradient its parameter's strides or those that are there, as it likes")
    params, opt, twin = made("SGD", torch.float32, mode, worlds(1))
    for step in range(3):
        opt.zero_grad(step > 1)
        twin.zero_grad(step > 1)
        for mine in (params, twin.params):
            backward(mine, step)
            CASES[case](mine, step)
            backward(mine, step + 10)
        opt.step()
        twin.step()
        assert_like(params, opt, twin)
    opt.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_buffer_that_holds_all_gradients_goes_on_holding_them(worlds, mode):
    params, opt, twin = made("SGD", torch.float32, mode, worlds(1))
    for mine, optimizer in ((params, opt), (twin.params, twin)):
        buffer = torch.zeros(sum(p.numel() for p in mine))
        for step in range(3):
            for p, part in zip(mine, buffer.split([p.numel() for p in mine]), strict=True):
                if p.grad is None:
                    p.grad = part.view(p.shape)
            backward(mine, step)
            buffer.clamp_(-0.5, 0.5)
            optimizer.step()
            buffer.zero_()
    assert_like(params, opt, twin)
    opt.close()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_of_a_wider_type_is_summed_in_it_and_rounded_in_the_step(worlds, mode, workers):
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    params, opt, twin = made("SGD", torch.bfloat16, mode, worlds(workers))
    for param in itertools.chain(params, twin.params):
        param.grad_dtype = torch.float32
    for step in range(3):
        opt.zero_grad()
        twin.zero_grad(True)
        for part in range(3):
            for v in range(workers):
                with opt.worker(v):
                    backward(params, 10 * step + part)
            backward(twin.params, 10 * step + part)
        opt.step()
        twin.step()
        assert_like(params, opt, twin)
        assert all(param.grad.dtype == torch.float32 for param in params)
    opt.close()


def test_complex_parts_of_a_conjugate_count_with_their_signs(worlds):
    for dtype in (torch.float32, torch.float64):
        params, opt, twin = made("SGD", dtype, "copy", worlds(1))
        for step in range(3):
            for mine in (params, twin.params):
                for i, param in enumerate(mine):
                    pair = torch.complex(
                        some(param.shape, step + i, dtype), some(param.shape, step - i + 50, dtype)
                    )
                    param.grad = pair.conj().imag if i % 2 else pair.conj().real
            opt.step()
            twin.step()
        assert_like(params, opt, twin)
        opt.close()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_are_kept_keep_their_values(worlds, mode, workers):
    """As methods do that compare the gradients of several losses."""
    params, opt, _ = made("SGD", torch.float32, mode, worlds(workers))
    kept = []
    for step, v in itertools.product(range(3), range(workers)):
        with opt.worker(v):
            for _ in range(3):
                for param in params:
                    param.grad = None
                backward(params, len(kept))
                kept.append([param.grad for param in params])
            for param, *grads in zip(params, *kept[-3:], strict=True):
                param.grad = sum(grads)
        if v == workers - 1:
            opt.step()
            opt.zero_grad(step == 1)
    for seed, grads in enumerate(kept):
        for i, grad in enumerate(grads):
            torch.testing.assert_close(grad, some(grad.shape, 100 * seed + i))
    opt.close()


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_a_graph_are_copied_and_stay_in_it(worlds, mode):
    params, opt, twin = made("SGD", torch.float32, mode, worlds(1))
    for step in range(3):
        for mine, optimizer in ((params, opt), (twin.params, twin)):
            optimizer.zero_grad()
            loss = sum((p.pow(3) * some(p.shape, step + i)).sum() for i, p in enumerate(mine))
            loss.backward(create_graph=True)
            sum(p.grad.square().sum() for p in mine).mul(0.01).backward()
            optimizer.step()
    assert_like(params, opt, twin)
    opt.close()


# -- What cannot be a gradient --------------------------------------------------------------------------------------


def released(grad, offset=0):
    buffer = torch.zeros(offset + grad.numel())
    part = buffer[offset:].view(grad.shape)
    buffer.untyped_storage().resize_(0)
    return part


WRONG = {
    "shorter": (each_data(lambda g: g.flatten()[:1].clone()), "has the shape"),
    "longer": (each_data(lambda g: torch.zeros(30)), "has the shape"),
    "of other dimensions": (each_data(lambda g: g[None]), "has the shape"),
    "of more dimensions in part": (each_data(lambda g: g.expand(2, *g.shape)), "has the shape"),
    "sparse": (each(lambda g: g.to_sparse()), "is sparse"),
    "complex": (each_data(lambda g: g.to(torch.complex64)), "is torch.complex64"),
    "a released part": (
        lambda params, step: setattr(params[0], "grad", released(params[0].grad, 1 << 20)),
        "has no memory",
    ),
    "released": (lambda params, step: setattr(params[0], "grad", released(params[0].grad)), "has no memory"),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_a_gradient_is_an_error_on_all_ranks_that_names_it(worlds, wrong, mode, workers):
    params, opt, twin = made("SGD", torch.float32, mode, worlds(workers))
    case, words = WRONG[wrong]
    ordinary = CASES["contiguous"]
    for step in range(2):
        opt.zero_grad()
        twin.zero_grad(mode != "view")
        train(params, opt, twin, ordinary, step, workers)
    opt.zero_grad()
    backward(params, 5)
    if COMM.rank == COMM.size - 1:
        case(params, 0)
    with pytest.raises(
        xc.UsageError, match=rf"rank {COMM.size - 1}.*parameter '0\.0' {words}|'0\.0' {words}"
    ):
        opt.step()
    assert_like(params, opt, twin)
    opt.zero_grad(True)
    twin.zero_grad(True)
    train(params, opt, twin, ordinary, 3, workers)
    assert_like(params, opt, twin)
    opt.close()


@pytest.mark.parametrize("wrong", WRONG)
def test_so_it_is_where_the_model_leaves_a_worker(worlds, wrong):
    params, opt, twin = made("SGD", torch.float32, "copy", worlds(2))
    case, words = WRONG[wrong]
    for last in (False, True):
        opt.zero_grad()
        with pytest.raises(xc.UsageError, match=rf"'0\.0' {words}"):
            with opt.worker(0):
                backward(params, 1)
                if COMM.rank == COMM.size - 1 and not last:
                    case(params, 1)
            with opt.worker(1):
                backward(params, 2)
                if COMM.rank == COMM.size - 1 and last:
                    case(params, 1)
            opt.step()
        assert opt._binding.bound == 0
    opt.zero_grad(True)
    train(params, opt, twin, CASES["contiguous"], 3, 2)
    assert_like(params, opt, twin)
    opt.close()


@pytest.mark.parametrize("wrong", WRONG)
def test_so_it_is_with_an_older_torch(worlds, without_table, wrong):
    test_what_cannot_be_a_gradient_is_an_error_on_all_ranks_that_names_it(worlds, wrong, "copy", 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_tensor_of_the_engine_that_got_other_data_is_replaced(worlds, mode):
    """Changes that a user makes to the tensors that zero_grad() left must not change where later gradients go."""
    params, opt, twin = made("SGD", torch.float32, mode, worlds(1))
    for step in range(4):
        opt.zero_grad(False)
        twin.zero_grad(False)
        train(params, opt, twin, CASES["swapped data" if step % 2 else "float64"], step, 1)
        assert_like(params, opt, twin)
    held = [param.grad for param in params]
    opt.zero_grad(True)
    for grad in held:
        grad.data = torch.full_like(grad, 3.0)
        grad.requires_grad_()
    twin.zero_grad(True)
    for step in range(2):
        train(params, opt, twin, CASES["contiguous"], step, 1)
        assert_like(params, opt, twin)
        opt.zero_grad(False)
        twin.zero_grad(False)
    opt.close()


@pytest.mark.parametrize("mode", MODES)
def test_gradients_lie_in_shared_memory_as_early_as_the_mode_says(worlds, mode):
    def inside():
        core = opt._binding.core
        return [p.grad.data_ptr() == core.gradients(0, i).address for i, p in enumerate(params) if p.numel()]

    params, opt, _ = made("SGD", torch.float32, mode, worlds(1))
    backward(params, 0)
    assert all(inside()) if mode == "hook" else not any(inside())
    opt.zero_grad(False)
    assert all(inside())
    for step in range(3):
        backward(params, step)
        assert all(inside()) if mode != "copy" or step == 0 else not any(inside())
        opt.step()
        opt.zero_grad()
    opt.close()


def test_tensors_of_the_engine_stay_where_nobody_kept_them(worlds):
    for mode in MODES:
        params, opt, _ = made("SGD", torch.float32, mode, worlds(2))
        before = [list(shown) for shown in opt._binding.gradients._shown]
        mended = [[tensor.data_ptr() for tensor in shown] for shown in before]
        del before
        for step in range(3):
            opt.zero_grad(step == 1)
            for v in range(2):
                with opt.worker(v):
                    backward(params, step)
            opt.step()
            held = opt._binding.gradients._reader.read(0, params, *reading(opt))[2]
            assert held == []
        assert mended == [[tensor.data_ptr() for tensor in shown] for shown in opt._binding.gradients._shown]
        opt.close()


def reading(opt):
    gradients = opt._binding.gradients
    return gradients._shown[0], np.zeros_like(gradients._sources)


def test_the_engine_refuses_a_gradient_of_another_number_of_bytes(worlds):
    params, opt, _ = made("SGD", torch.float32, "copy", worlds(1))
    binding = opt._binding
    sources = np.zeros((len(params), 2), np.int64)
    sources[:, 1] = -1
    sources[1] = params[1].data_ptr(), 8
    with pytest.raises(
        xc.UsageError, match="gradient of parameter '0.1' has 8 bytes, and the parameter has 48"
    ):
        binding.core.gather(0, sources, binding.present[0])
    opt.close()


@pytest.mark.parametrize("gradients", ["copy", "hook", "view"])
def test_saving_plain_leaves_draws_no_warning_of_hooks(worlds, gradients, recwarn):
    leaf = torch.ones(4, requires_grad=True)
    opt = xc.SGD([leaf], lr=0.1, world=worlds(2), gradients=gradients)
    for _ in range(2):
        for v in range(2):
            with opt.worker(v):
                leaf.sum().backward()
        opt.step()
    torch.save(leaf, io.BytesIO())
    assert not [warning for warning in recwarn if "hook" in str(warning.message)]
    opt.close()


# -- Gradients in shared memory that somebody keeps -----------------------------------------------------------------


def in_shared_memory(kind, count=1, **options):
    """Parameters whose gradients lie in shared memory, where the engine is ours."""
    params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(count)]
    opt = kind(params, lr=1.0, **options)
    for turn in range(2):
        sum((i + 1) * p.sum() for i, p in enumerate(params)).backward()
        if turn == 0:
            opt.step()
            opt.zero_grad(set_to_none=False)
    return params, opt


def keep_and_drop(params, opt):
    """A gradient that is kept, while its parameter has none: what is written into it is nobody's gradient."""
    kept, params[0].grad = params[0].grad, None
    opt.step()
    seen = kept.clone()
    kept.fill_(5.0)
    opt.step()
    return [seen, *(p.detach().clone() for p in params)]


def keep_and_give_back(params, opt):
    kept, params[0].grad = params[0].grad, None
    opt.step()
    params[0].grad = kept
    opt.step()
    return [kept.clone(), *(p.detach().clone() for p in params)]


def keep_and_zero(params, opt):
    """A gradient that is kept when another takes its place is not zeroed, and no later pass writes into it."""
    kept, params[0].grad = params[0].grad, None
    params[0].grad = torch.full((4,), 7.0)
    opt.zero_grad(set_to_none=False)
    seen = kept.clone()
    (5 * params[0].sum()).backward()
    opt.step()
    return [seen, kept.clone(), *(p.detach().clone() for p in params)]


def give_data_and_exchange(params, opt):
    params[0].grad.data = torch.full((4,), 7.0)
    params[0].grad, params[-1].grad = params[-1].grad, params[0].grad
    opt.step()
    return [p.detach().clone() for p in params]


def give_data_and_zero(params, opt):
    """One buffer for a gradient's data: it is zeroed, and what is written into it counts."""
    flat = torch.zeros(4)
    params[0].grad.data = flat
    params[0].sum().backward()
    opt.zero_grad(set_to_none=False)
    seen = flat.clone()
    flat.fill_(3.0)
    opt.step()
    return [seen, *(p.detach().clone() for p in params)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "what", [keep_and_drop, keep_and_give_back, keep_and_zero, give_data_and_exchange, give_data_and_zero]
)
def test_a_gradient_that_somebody_keeps_is_theirs(world, what, mode):
    wanted = what(*in_shared_memory(torch.optim.SGD, 2))
    params, opt = in_shared_memory(xc.SGD, 2, world=world, gradients=mode)
    for found, value in zip(what(params, opt), wanted, strict=True):
        torch.testing.assert_close(found, value)
    opt.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("workers", [1, 2])
def test_writes_into_a_kept_gradient_reach_no_mean(worlds, mode, workers):
    world = worlds(workers)
    params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    opt = xc.SGD(params, lr=1.0, world=world, gradients=mode)
    kept = []

    def bring(drops):
        for v in range(workers):
            with opt.worker(v):
                params[1].sum().backward()
                if not drops or world.rank * workers + v > 0:
                    params[0].sum().backward()
                elif kept == []:
                    kept.append(params[0].grad)
                    params[0].grad = None

    bring(False)
    opt.step()
    opt.zero_grad(set_to_none=False)
    bring(False)
    bring(True)
    for grad in kept:
        grad.fill_(100.0)
    before = opt.master(0).clone()
    opt.step()
    torch.testing.assert_close(opt.master(0), before - 2.0 * (world.K - 1) / world.K)
    opt.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["gradient", "data"])
def test_zeroing_a_part_leaves_gradients_where_others_hold_them(world, mode, how):
    outcome = []
    for kind, more in ((torch.optim.SGD, {}), (xc.SGD, {"world": world, "gradients": mode})):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
        opt = kind(model.parameters(), lr=1.0, **more)
        if more:
            opt.attach(model)
        for _ in range(2):
            model(torch.ones(1, 2)).sum().backward()
            opt.zero_grad(set_to_none=False)
        flat = torch.ones(2, 2)
        if how == "data":
            model[0].weight.grad.data = flat
        else:
            model[0].weight.grad = flat
        model[0].zero_grad(set_to_none=False)
        seen = flat.clone()
        flat.add_(3)
        opt.step()
        outcome.append([seen, *(p.detach().clone() for p in model.parameters())])
    for found, wanted in zip(*outcome, strict=True):
        torch.testing.assert_close(found, wanted)
    opt.close()


@pytest.mark.parametrize("mode", MODES)
def test_backward_passes_in_several_threads(world, mode):
    """With gradients that are copied when the step begins they are added up; early ones take one thread."""
    params, opt = in_shared_memory(xc.SGD, 2, world=world, gradients=mode)
    before = [p.detach().clone() for p in params]
    for _ in range(2):  # one after the other, which is not told from both at once
        thread = threading.Thread(target=lambda: (params[0].sum() + 2 * params[1].sum()).backward())
        thread.start()
        thread.join()
    (params[0].sum() + 2 * params[1].sum()).backward()
    if mode == "hook":
        with pytest.raises(xc.UsageError, match=r"ran in \d threads"):
            opt.step()
        for p, was in zip(params, before, strict=True):
            assert torch.equal(p.detach(), was)
        opt.zero_grad()
        (params[0].sum() + 2 * params[1].sum()).backward()
    opt.step()
    times = 1 if mode == "hook" else 4  # one is from the beginning
    for factor, p, was in zip((1, 2), params, before, strict=True):
        torch.testing.assert_close(p.detach(), was - times * factor)
    opt.close()
