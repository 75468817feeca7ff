"""Training loops as others write them: no false alarm about foreign writes, and the weights of torch.optim.

Each loop runs twice, as written: with this library's optimizer, and with torch's on gradients that MPI has averaged.
"""

import copy
import functools
import io
import math

import numpy as np
import pytest
from reference import assert_same_bits

import extrapcomm as xc

torch = pytest.importorskip("torch")
nn, functional, lr_scheduler = torch.nn, torch.nn.functional, torch.optim.lr_scheduler
torch.set_num_threads(1)


# -- The manners of training: optimizer(kind, params, **hyper) -> the tensors that count -------------------


def digits(optimizer):
    """Convolutions and dropout; train and test in turns, a rate that falls with every epoch, saved at the end."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten(), nn.Linear(36, 10)
    )
    opt = optimizer("Adam", model.parameters(), lr=0.01)
    train_set, test_set = (
        torch.utils.data.TensorDataset(torch.randn(n, 1, 8, 8), torch.randint(10, (n,))) for n in (12, 8)
    )
    scheduler = lr_scheduler.StepLR(opt, step_size=1, gamma=0.7)
    for _ in range(2):
        model.train()
        for image, label in torch.utils.data.DataLoader(train_set, batch_size=4, shuffle=True):
            opt.zero_grad()
            functional.cross_entropy(model(image), label).backward()
            opt.step()
        model.eval()
        with torch.no_grad():
            for image, label in torch.utils.data.DataLoader(test_set, batch_size=4):
                model(image).argmax(dim=1, keepdim=True).eq(label.view(-1, 1)).sum().item()
        scheduler.step()
    torch.save(model.state_dict(), io.BytesIO())
    return [*model.parameters()]


class WordModel(nn.Module):
    def __init__(self, words=11, width=6):
        super().__init__()
        self.encoder, self.lstm = nn.Embedding(words, width), nn.LSTM(width, width, 2)
        self.decoder = nn.Linear(width, words)
        self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)

    def forward(self, words, hidden):
        output, hidden = self.lstm(self.encoder(words), hidden)
        return self.decoder(output).flatten(0, 1), hidden


def word_language_model(optimizer):
    """Truncated backpropagation with a hidden state carried on, clipping, tied weights, a rate cut by hand."""
    model = WordModel()
    opt = optimizer("SGD", model.parameters(), lr=1.0)
    text = torch.randint(11, (17, 3))
    for epoch in range(3):
        hidden = torch.zeros(2, 3, 6), torch.zeros(2, 3, 6)
        for at in range(0, 16, 4):
            model.train()
            model.zero_grad()
            hidden = tuple(state.detach() for state in hidden)
            output, hidden = model(text[at : at + 4], hidden)
            functional.cross_entropy(output, text[at + 1 : at + 5].flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            opt.step()
        model.eval()
        with torch.no_grad():
            functional.cross_entropy(model(text[:-1], hidden)[0], text[1:].flatten()).item()
        torch.save(model, io.BytesIO())
        if epoch:
            for group in opt.param_groups:
                group["lr"] /= 4
    assert model.decoder.weight is model.encoder.weight
    return [*model.parameters()]


class CausalBlock(nn.Module):
    def __init__(self, width=8, length=6):
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.register_buffer("mask", torch.ones(length, length).tril() == 0)

    def forward(self, x):
        length = x.shape[1]
        q, k, v = self.attention(self.first(x)).chunk(3, dim=-1)
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(self.mask[:length, :length], -math.inf).softmax(dim=-1)
        x = x + self.projection(scores @ v)
        return x + self.narrow(functional.gelu(self.wide(self.second(x))))


class CausalTransformer(nn.Module):
    def __init__(self, words=7, width=8, length=6):
        super().__init__()
        self.length = length
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(CausalBlock(width, length), CausalBlock(width, length))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, words):
        x = self.words(words) + self.places(torch.arange(words.shape[1]))
        return self.head(self.norm(self.blocks(x)))

    @torch.no_grad()
    def generate(self, words, count):
        for _ in range(count):
            odds = self(words[:, -self.length :])[:, -1].softmax(dim=-1)
            words = torch.cat([words, torch.multinomial(odds, 1)], dim=1)
        return words


def small_gpt(optimizer):
    """Decayed and undecayed groups, gradients dropped through the model, clipping, text made now and then."""
    model = CausalTransformer()
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    decayed = [p for p in model.parameters() if id(p) in matrices]
    others = [p for p in model.parameters() if id(p) not in matrices]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    opt = optimizer("AdamW", groups, lr=3e-3, betas=(0.9, 0.95))
    for step in range(6):
        model.train()
        text = torch.randint(7, (3, 7))
        logits = model(text[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if step % 3 == 2:
            model.eval()
            assert model.generate(text[:, :2], 8).shape == (3, 10)
    return [*model.parameters()]


def normed():
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 2))


def fit(model, x):
    return functional.mse_loss(model(x), x[:, :2])


def averaged_weights(optimizer):
    """Stochastic weight averaging with its schedule, an exponential average, and BatchNorm re-estimated."""
    model = normed()
    swa = torch.optim.swa_utils
    mean = swa.AveragedModel(model)
    moving = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.9), use_buffers=True)
    opt = optimizer("SGD", model.parameters(), lr=0.1, momentum=0.9)
    data = [torch.randn(6, 5) for _ in range(4)]
    schedule, constant = lr_scheduler.CosineAnnealingLR(opt, T_max=2), swa.SWALR(opt, swa_lr=0.05)
    for epoch in range(5):
        for x in data:
            opt.zero_grad()
            fit(model, x).backward()
            opt.step()
            moving.update_parameters(model)
        if epoch >= 2:
            mean.update_parameters(model)
            constant.step()
        else:
            schedule.step()
    swa.update_bn(data, mean)
    return [*model.parameters(), *mean.parameters(), *moving.parameters(), *mean.buffers()]


def copied_teacher(optimizer):
    """A deep copy follows the model, by its parameters and by their data."""
    model = normed()
    teacher = copy.deepcopy(model).requires_grad_(False)
    opt = optimizer("SGD", model.parameters(), lr=0.1)
    for step in range(6):
        opt.zero_grad()
        x = torch.randn(6, 5)
        functional.mse_loss(model(x), teacher(x) + x[:, :2]).backward()
        opt.step()
        with torch.no_grad():
            for old, new in zip(teacher.parameters(), model.parameters(), strict=True):
                if step % 2:
                    old.mul_(0.9).add_(new, alpha=0.1)
                else:
                    old.data.mul_(0.9).add_(new.data, alpha=0.1)
    teacher.load_state_dict(model.state_dict())
    return [*model.parameters(), *teacher.parameters()]


def restarted_cosine(optimizer):
    """A rate set after every batch from the fraction of an epoch."""
    model = normed()
    opt = optimizer("SGD", model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
    scheduler = lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=2, T_mult=2)
    for epoch in range(3):
        for batch in range(4):
            opt.zero_grad()
            fit(model, torch.randn(6, 5)).backward()
            opt.step()
            scheduler.step(epoch + batch / 4)
    return [*model.parameters()]


def one_cycle(optimizer):
    """A schedule that moves the momentum against the rate, resumed in the middle from its state."""
    model = normed()
    opt = optimizer("SGD", model.parameters(), lr=0.1, momentum=0.9)

    def schedule():
        return lr_scheduler.OneCycleLR(opt, max_lr=0.2, total_steps=13)

    scheduler = schedule()
    for step in range(12):
        if step == 6:
            saved = scheduler.state_dict()
            scheduler = schedule()
            scheduler.load_state_dict(saved)
        fit(model, torch.randn(6, 5)).backward()
        opt.step()
        scheduler.step()
        opt.zero_grad()
    return [*model.parameters()]


def reduced_on_plateau(optimizer):
    """A rate that falls with a loss that all ranks know, through a closure that returns it."""
    model = normed()
    opt = optimizer("Adam", model.parameters(), lr=0.01)
    x = torch.randn(6, 5)
    scheduler = lr_scheduler.ReduceLROnPlateau(opt, patience=0, threshold=10.0)

    def closure():
        opt.zero_grad()
        loss = fit(model, x)
        loss.backward()
        return loss

    for _ in range(5):
        assert opt.step(closure).item() > 0
        scheduler.step(1.0)
    assert opt.param_groups[0]["lr"] < 0.01
    return [*model.parameters()]


def compiled(optimizer):
    """The compiled model in training and in evaluation; the plain one is still the same model."""
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2))
    fast = torch.compile(model, backend="aot_eager")
    opt = optimizer("AdamW", fast.parameters(), lr=0.01)
    for _ in range(4):
        opt.zero_grad()
        fit(fast, torch.randn(6, 5)).backward()
        opt.step()
    x = torch.randn(6, 5)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    assert all(name.startswith("_orig_mod.") for name in fast.state_dict())
    return [*model.parameters()]


def checkpointed(optimizer):
    """Activations computed again in the backward pass, in both of torch's ways."""
    first, second = (nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Dropout(0.2)) for _ in range(2))
    opt = optimizer("SGD", [*first.parameters(), *second.parameters()], lr=0.1)
    for _ in range(4):
        opt.zero_grad()
        x = torch.randn(6, 5, requires_grad=True)
        y = torch.utils.checkpoint.checkpoint(first, x, use_reentrant=False)
        torch.utils.checkpoint.checkpoint(second, y, use_reentrant=True).square().mean().backward()
        opt.step()
    return [*first.parameters(), *second.parameters()]


def inspected(optimizer):
    """Accumulated gradients, kept in memory, that are measured, clamped, replaced and logged; hooks on tensors."""
    model, log = normed(), []
    model[0].weight.register_hook(lambda grad: grad * 0.5)
    model[3].weight.register_post_accumulate_grad_hook(lambda p: log.append(p.grad.norm()))
    opt = optimizer("SGD", model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        opt.zero_grad(set_to_none=False)
        for _ in range(2):
            (fit(model, torch.randn(6, 5)) / 2).backward()
        log.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm())
        for p in model.parameters():
            p.grad.data.clamp_(-0.1, 0.1)
        nn.utils.clip_grad_value_(model.parameters(), 0.05)
        model[3].bias.grad = model[3].bias.grad.clone() * 2
        opt.step()
        log.append(nn.utils.parameters_to_vector(model.parameters()).norm().detach())
        log += [p.detach().abs().max() for p in model.parameters()]
    return [*model.parameters()]


def parametrized(optimizer):
    """Weight and spectral normalisation as parametrizations."""
    wrap = nn.utils.parametrizations
    model = nn.Sequential(
        wrap.weight_norm(nn.Linear(5, 16)), nn.Tanh(), wrap.spectral_norm(nn.Linear(16, 16)), nn.Linear(16, 2)
    )
    opt = optimizer("Adam", model.parameters(), lr=0.01)
    for _ in range(4):
        model.train()
        opt.zero_grad()
        fit(model, torch.randn(6, 5)).backward()
        opt.step()
        model.eval()
        with torch.no_grad(), nn.utils.parametrize.cached():
            model(torch.randn(6, 5))
    return [*model.parameters(), *model.buffers()]


def thawed(optimizer):
    """The head alone, then everything, then the head again, with decay that must not reach what is frozen."""
    body, head = nn.Sequential(nn.Linear(5, 16), nn.Tanh()), nn.Linear(16, 2)
    opt = optimizer("AdamW", [*body.parameters(), *head.parameters()], lr=0.01, weight_decay=0.5)
    for trainable in (False, True, False):
        body.requires_grad_(trainable)
        for _ in range(2):
            opt.zero_grad()
            fit(nn.Sequential(body, head), torch.randn(6, 5)).backward()
            opt.step()
    return [*body.parameters(), *head.parameters()]


def two_losses(optimizer):
    """Generator and critic in turns, one frozen while the other learns."""
    generator, critic = nn.Linear(3, 5), nn.Sequential(nn.Linear(5, 8), nn.LeakyReLU(), nn.Linear(8, 1))
    for_generator = optimizer("Adam", generator.parameters(), lr=0.01, betas=(0.5, 0.999))
    for_critic = optimizer("Adam", critic.parameters(), lr=0.01, betas=(0.5, 0.999))
    for _ in range(3):
        critic.zero_grad()
        fake = generator(torch.randn(4, 3))
        functional.softplus(-critic(torch.randn(4, 5))).mean().backward()
        functional.softplus(critic(fake.detach())).mean().backward()
        for_critic.step()
        generator.zero_grad()
        functional.softplus(-critic(fake)).mean().backward()
        for_generator.step()
    return [*generator.parameters(), *critic.parameters()]


MANNERS = [
    digits,
    word_language_model,
    small_gpt,
    averaged_weights,
    copied_teacher,
    restarted_cosine,
    one_cycle,
    reduced_on_plateau,
    compiled,
    checkpointed,
    inspected,
    parametrized,
    thawed,
    two_losses,
]


# -- Running them ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def averaged(kind, comm):
    """torch's optimizer of that name, on gradients averaged over the ranks."""

    class Averaged(getattr(torch.optim, kind)):
        @torch.no_grad()
        def step(self, closure=None):
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                p.grad = torch.from_numpy(comm.allreduce(p.grad.numpy()) / comm.size)
            super().step()
            return loss

    return Averaged


def outcome(manner, optimizer, rank):
    """What counts after the loop; ranks have the same model but data and dropout of their own."""

    def seeded(kind, params, **hyper):
        made = optimizer(kind, params, **hyper)
        torch.manual_seed(100 + rank)
        return made

    torch.manual_seed(0)
    return [tensor.detach().clone() for tensor in manner(seeded)]


@pytest.fixture
def optimizer(world):
    """optimizer(name, params, **hyper): this library's in the world of all ranks, closed after the test."""
    made = []

    def make(name, params, **hyper):
        made.append(getattr(xc, name)(params, world=world, **hyper))
        return made[-1]

    make.made = made
    yield make
    for opt in made:
        opt.close()


@pytest.mark.parametrize("gradients", ["copy", "hook", "view"])
@pytest.mark.parametrize("manner", MANNERS, ids=lambda manner: manner.__name__)
def test_loop_written_for_torch_gives_torchs_weights(world, optimizer, manner, gradients):
    if (manner, gradients) == (thawed, "view"):
        pytest.skip("zero_grad() leaves zeros there, and zeros are gradients")
    got = outcome(manner, functools.partial(optimizer, gradients=gradients), world.rank)
    wanted = outcome(manner, lambda name, *a, **h: averaged(name, world.comm)(*a, **h), world.rank)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("manner", MANNERS, ids=lambda manner: manner.__name__)
def test_loop_written_for_torch_runs_with_extrapolation(world, optimizer, manner):
    """Every loop with EXTRAP-SGD: no alarm, finite weights, and one w for all ranks."""

    def extrapolated(name, params, **hyper):
        common = {key: hyper[key] for key in ("lr", "momentum", "weight_decay", "nesterov") if key in hyper}
        return optimizer("ExtrapSGD", params, inner_lr="lr", **{"momentum": 0.5, **common})

    outcome(manner, extrapolated, world.rank)
    for opt in optimizer.made:
        weights = [opt.master(i).numpy() for i in range(len(opt.param_groups[0]["params"]))]
        assert all(np.isfinite(w).all() for w in weights)
        for w, of_rank_0 in zip(weights, world.comm.bcast(weights), strict=True):
            assert_same_bits(w, of_rank_0)


def trained(world, seed=0):
    """A model and its extrapolating optimizer after some steps, displaced on every rank."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 2))
    opt = xc.ExtrapSGD(model.parameters(), lr=0.1, momentum=0.9, inner_lr="lr", world=world)
    opt.attach(model)
    for step in range(3):
        train_on(model, opt, step)
    return model, opt


def train_on(model, opt, step):
    torch.manual_seed(10 * step + opt.world.rank)
    opt.zero_grad()
    fit(model, torch.randn(6, 5)).backward()
    opt.step()


def test_rank_0_saves_in_the_usual_line_and_all_load_the_same_bits(world, tmp_path):
    path = world.comm.bcast(tmp_path / "model.pt")
    model, opt = trained(world)
    wanted = [opt.master(i) for i in range(4)]
    if world.rank == 0:
        torch.save(model.state_dict(), path)
    train_on(model, opt, step=3)
    world.comm.Barrier()
    other, resumed = trained(world, seed=1)
    other.load_state_dict(torch.load(path))
    resumed.zero_grad()
    resumed.step()
    for i, (w, p) in enumerate(zip(wanted, other.parameters(), strict=True)):
        assert_same_bits(resumed.master(i).numpy(), w.numpy())
        assert_same_bits(p.detach().numpy(), w.numpy())
    train_on(other, resumed, step=3)
    for i in range(4):
        assert not torch.equal(resumed.master(i), wanted[i])
    opt.close()
    resumed.close()


def test_loader_with_workers_of_its_own_feeds_the_loop(world):
    if world.size > 1:
        pytest.skip("MPI libraries warn of forks; one process shows what happens")
    model, opt = trained(world)
    loader = torch.utils.data.DataLoader(torch.randn(12, 5), batch_size=4, num_workers=2)
    for _ in range(2):
        for x in loader:
            opt.zero_grad()
            fit(model, x).backward()
            opt.step()
    assert np.isfinite(opt.master(0).numpy()).all()
    opt.close()
