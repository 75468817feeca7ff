"""Other libraries' trainers with the fused step do what a loop of our own does: same clipping, same weights."""

import subprocess
import sys

import pytest
from conftest import COMM

import extrapcomm as xc

torch = pytest.importorskip("torch")

LIMIT, LR, STEPS, BATCH = 0.25, 0.5, 6, 4
KINDS = [xc.SGD, xc.ExtrapSGD]
pytestmark = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


class Net(torch.nn.Module):
    """A classifier that returns the loss in the form that Trainer understands."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))

    def forward(self, x, labels):
        logits = self.layers(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def samples(world):
    """This rank's samples, in order."""
    torch.manual_seed(11)
    x, y = 3 * torch.randn(STEPS * BATCH * world.size, 6), torch.arange(STEPS * BATCH * world.size) % 3
    return [{"x": x[i], "labels": y[i]} for i in range(world.rank, len(y), world.size)]


def loader(world, batch=BATCH):
    return torch.utils.data.DataLoader(samples(world), batch)


def optimizer_of(kind, model, world):
    return kind(model.parameters(), LR, momentum=0.9, world=world)


def own_loop(kind, world, limit=LIMIT, epochs=1):
    """The master weights and the norms of a plain loop."""
    model, norms = Net(), []
    opt = optimizer_of(kind, model, world)
    opt.max_grad_norm = limit
    for batch in [batch for _ in range(epochs) for batch in loader(world)]:
        opt.zero_grad()
        model(**batch)["loss"].backward()
        opt.step()
        norms.append(opt.grad_norm)
    opt.close()
    return values(model), norms


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same(ours, theirs, atol=0.0):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


# -- Accelerate ------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator():
    """accelerator(**options); its singletons are forgotten afterwards."""
    accelerate = pytest.importorskip(
        "accelerate", reason="accelerate is not installed (extrapcomm[integrations])"
    )
    forget = accelerate.state.AcceleratorState._reset_state
    forget(reset_partial_state=True)
    yield accelerate.Accelerator
    forget(reset_partial_state=True)


def accelerated_loop(accelerator, kind, world, batch=BATCH):
    from extrapcomm.integrations import adapt_accelerator

    model, norms = Net(), []
    opt = optimizer_of(kind, model, world)
    wrapped = adapt_accelerator(accelerator, opt)
    model, wrapped, batches = accelerator.prepare(model, wrapped, loader(world, batch))
    for each in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**each)["loss"])
            if accelerator.sync_gradients:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), LIMIT))
            wrapped.step()
            wrapped.zero_grad()
    opt.close()
    return values(model), [norm.item() for norm in norms]


def test_accelerate_clips_the_mean_gradient_in_the_step(accelerator, world, kind):
    weights, norms = accelerated_loop(accelerator(), kind, world)
    expected, expected_norms = own_loop(kind, world)
    assert_same(weights, expected)
    assert norms == pytest.approx(expected_norms)
    assert max(norms) > LIMIT


def test_accelerate_divides_accumulated_gradients_itself(accelerator, world, kind):
    weights, norms = accelerated_loop(
        accelerator(gradient_accumulation_steps=2), kind, world, batch=BATCH // 2
    )
    expected, expected_norms = own_loop(kind, world)
    assert_same(weights, expected, atol=1e-5)
    assert norms == pytest.approx(expected_norms, rel=1e-4)


def test_accelerate_counts_one_process_and_knows_rank_0_from_the_others(accelerator, world, kind):
    from extrapcomm.integrations import adapt_accelerator

    opt = optimizer_of(kind, Net(), world)
    adapted = accelerator()
    adapt_accelerator(adapted, opt)
    opt.close()
    assert adapted.num_processes == 1
    assert adapted.is_main_process == (world.rank == 0)


def test_accelerate_learns_of_a_skipped_step_and_leaves_the_schedule(accelerator, world, kind):
    from extrapcomm.integrations import adapt_accelerator

    model = Net()
    opt = kind(model.parameters(), LR, world=world, skip_nonfinite=True)
    adapted = accelerator()
    wrapped = adapt_accelerator(adapted, opt)
    schedule = adapted.prepare(torch.optim.lr_scheduler.ExponentialLR(opt, 0.5))
    for factor in (1.0, float("nan") if world.rank == world.size - 1 else 1.0):
        wrapped.zero_grad()
        adapted.backward(model(**next(iter(loader(world))))["loss"] * factor)
        wrapped.step()
        schedule.step()
    assert adapted.optimizer_step_was_skipped
    assert opt.param_groups[0]["lr"] == LR / 2
    opt.close()


def test_accelerate_on_the_cpu_forms_no_process_group(accelerator, world, kind):
    from extrapcomm.integrations import adapt_accelerator, one_process

    opt = optimizer_of(kind, Net(), world)
    with one_process():
        adapted = accelerator(cpu=True)
    adapt_accelerator(adapted, opt)
    opt.close()
    assert adapted.num_processes == 1
    assert not torch.distributed.is_initialized()


def test_accelerate_saves_and_loads_master_weights_and_state(accelerator, world, kind, tmp_path):
    from extrapcomm.integrations import adapt_accelerator

    folder = COMM.bcast(str(tmp_path))
    saving, loading = Net(), Net()
    opt = optimizer_of(kind, saving, world)
    opt.attach(saving)
    adapted = accelerator()
    saving, wrapped = adapted.prepare(saving, adapt_accelerator(adapted, opt))
    saving(**next(iter(loader(world))))["loss"].backward()
    wrapped.step()
    adapted.save_state(folder, safe_serialization=False)
    COMM.Barrier()
    saved = opt.state_dict()["state"]
    opt.close()
    adapted.free_memory()
    opt = optimizer_of(kind, loading, world)
    opt.attach(loading)
    loading, _ = adapted.prepare(loading, adapt_accelerator(adapted, opt))
    adapted.load_state(folder)
    loaded = opt.state_dict()["state"]
    opt.close()
    assert_same(values(loading), values(saving))
    for i in saved:
        assert_same(saved[i].values(), loaded[i].values())


def test_accelerate_trains_weights_loaded_before_it(accelerator, world, kind):
    from extrapcomm.integrations import adapt_accelerator

    model, loaded = Net(), {name: torch.full_like(p, 0.25) for name, p in Net().state_dict().items()}
    opt = optimizer_of(kind, model, world)
    opt.attach(model)
    model.load_state_dict(loaded)
    adapted = accelerator()
    model, wrapped = adapted.prepare(model, adapt_accelerator(adapted, opt))
    wrapped.step()  # without gradients
    opt.close()
    assert_same(values(model), loaded.values())


def test_accelerate_with_what_each_rank_would_do_alone_is_refused(accelerator, world, virtual, kind):
    from extrapcomm.integrations import adapt_accelerator

    model, other = Net(), torch.nn.Linear(2, 2)
    opt = optimizer_of(kind, model, world)
    adapted = accelerator()
    adapt_accelerator(adapted, opt)
    with pytest.raises(xc.UsageError, match="by value"):
        adapted.clip_grad_value_(model.parameters(), 1.0)
    with pytest.raises(xc.UsageError, match="2-norm"):
        adapted.clip_grad_norm_(model.parameters(), 1.0, norm_type=1)
    with pytest.raises(xc.UsageError, match="give just these"):
        adapted.clip_grad_norm_(list(model.parameters())[1:], 1.0)
    other(torch.ones(1, 2)).sum().backward()
    with pytest.raises(xc.UsageError, match="give just these"):
        adapted.clip_grad_norm_([*model.parameters(), *other.parameters()], 1.0)
    assert adapted.clip_grad_norm_(other.parameters(), 1.0) > 1  # not ours: Accelerate's own
    opt.close()
    with pytest.raises(xc.UsageError, match="not SGD"):
        adapt_accelerator(adapted, torch.optim.SGD(model.parameters()))
    busy = optimizer_of(kind, Net(), virtual(2))
    with pytest.raises(xc.UsageError, match="one worker per rank"):
        adapt_accelerator(adapted, busy)
    busy.close()


# -- transformers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def trainer(accelerator, world, virtual, tmp_path):
    """trainer(kind, model, **arguments) -> Trainer, optimizer."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed (extrapcomm[integrations])"
    )
    from extrapcomm.integrations import adapt_trainer

    folder = COMM.bcast(str(tmp_path))

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    def make(kind, model, **arguments):
        defaults = {
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "num_train_epochs": 1,
        }
        settings = {"per_device_train_batch_size": BATCH, "max_grad_norm": LIMIT, "report_to": "none"}
        settings["dataloader_pin_memory"] = False
        told = transformers.TrainingArguments(folder, disable_tqdm=True, **(defaults | settings | arguments))
        opt = optimizer_of(kind, model, world)
        data = {"train_dataset": samples(world), "eval_dataset": samples(virtual(1))}
        return adapt_trainer(InOrder(model, told, optimizers=(opt, None), **data)), opt

    return make


def logged_norms(trainer):
    return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


def test_trainer_clips_the_mean_gradient_and_logs_its_norm(trainer, world, kind):
    model = Net()
    training, opt = trainer(kind, model)
    training.train()
    opt.close()
    expected, expected_norms = own_loop(kind, world)
    assert_same(values(model), expected)
    assert logged_norms(training) == pytest.approx(expected_norms)


def test_trainer_accumulates(trainer, world, kind):
    model = Net()
    training, opt = trainer(
        kind, model, per_device_train_batch_size=BATCH // 2, gradient_accumulation_steps=2
    )
    training.train()
    opt.close()
    assert_same(values(model), own_loop(kind, world)[0], atol=1e-5)


def test_trainer_takes_bfloat16_on_the_cpu(trainer, world, kind):
    from extrapcomm.integrations import one_process

    model = Net()
    with one_process():
        training, opt = trainer(kind, model, use_cpu=True, bf16=True)
    training.train()
    opt.close()
    assert_same(values(model), own_loop(kind, world)[0], atol=0.1)


def test_trainer_without_a_bound_logs_the_norm_and_does_not_clip(trainer, world, kind):
    model = Net()
    training, opt = trainer(kind, model, max_grad_norm=0.0)
    training.train()
    opt.close()
    expected, expected_norms = own_loop(kind, world, limit=float("inf"))
    assert_same(values(model), expected)
    assert logged_norms(training) == pytest.approx(expected_norms)


def test_trainer_saves_on_rank_0_and_resumes(trainer, world, kind):
    model = Net()
    training, opt = trainer(kind, model, save_strategy="epoch")
    training.train()
    opt.close()
    model = Net()
    training, opt = trainer(kind, model, save_strategy="epoch", num_train_epochs=2)
    training.train(resume_from_checkpoint=True)
    opt.close()
    if kind is xc.SGD:  # another starts undisplaced after loading
        assert_same(values(model), own_loop(kind, world, epochs=2)[0])
    assert training.args.should_save == (world.rank == 0)
    assert training.state.global_step == 2 * STEPS


def test_trainer_saves_the_master_weights(trainer, kind):
    model = Net()
    training, opt = trainer(kind, model, save_strategy="epoch")
    training.train()
    saved = from_safetensors(f"{training.args.output_dir}/checkpoint-{STEPS}")
    opt.close()
    assert_same(values(model), [saved[name] for name, _ in model.named_parameters()])


def test_trainer_evaluates_the_master_weights(trainer, virtual, kind):
    model = Net()
    training, opt = trainer(kind, model)
    training.train()
    loss = training.evaluate()["eval_loss"]
    opt.close()
    assert loss == pytest.approx(loss_of(model, virtual(1)), rel=1e-6)


def test_trainer_ends_with_the_best_model(trainer, kind):
    model = Net()
    both = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    worst = {"load_best_model_at_end": True, "greater_is_better": True}  # so that it is not the last
    training, opt = trainer(kind, model, **both, **worst)
    training.train()
    loss = training.evaluate()["eval_loss"]
    opt.close()
    evaluated = [entry["eval_loss"] for entry in training.state.log_history if "eval_loss" in entry]
    saved = from_safetensors(training.state.best_model_checkpoint)
    assert_same(values(model), [saved[name] for name, _ in model.named_parameters()])
    assert loss == pytest.approx(max(evaluated), rel=1e-6)


def from_safetensors(folder):
    from safetensors.torch import load_file

    return load_file(f"{folder}/model.safetensors")


def loss_of(model, world):
    with torch.no_grad():
        return torch.stack([model(**batch)["loss"] for batch in loader(world, batch=8)]).mean().item()


# -- Lightning -------------------------------------------------------------------------------------------------------


@pytest.fixture
def lightning(world, tmp_path):
    """lightning(kind, **options) -> Trainer, module."""
    library = pytest.importorskip("lightning", reason="lightning is not installed (extrapcomm[integrations])")
    from extrapcomm.integrations import FusedStrategy

    class Module(library.LightningModule):
        def __init__(self, kind):
            super().__init__()
            self.net, self.kind, self.norms, self.evaluated = Net(), kind, [], None

        def training_step(self, batch, _):
            return self.net(**batch)["loss"]

        def on_train_end(self):
            self.trainer.save_checkpoint(path)

        def on_train_batch_end(self, *_):
            self.norms.append(self.optimizers().optimizer.grad_norm)

        def validation_step(self, batch, _):
            self.evaluated = values(self.net)
            self.log("loss", self.net(**batch)["loss"])

        test_step = validation_step

        def configure_optimizers(self):
            return optimizer_of(self.kind, self, world)

    path = COMM.bcast(str(tmp_path / "last.ckpt"))
    noisy = ("enable_progress_bar", "enable_model_summary", "logger", "enable_checkpointing")
    usual = {"gradient_clip_val": LIMIT, "max_epochs": 1, "accelerator": "cpu", "devices": 1}

    def make(kind, **options):
        options = usual | dict.fromkeys(noisy, False) | options
        return library.Trainer(strategy=FusedStrategy(world), **options), Module(kind)

    yield make
    from lightning.pytorch.utilities import rank_zero_only

    rank_zero_only.rank = 0


def test_lightning_clips_the_mean_gradient_in_the_step(lightning, world, kind):
    trainer, module = lightning(kind)
    trainer.fit(module, loader(world))
    expected, expected_norms = own_loop(kind, world)
    assert_same(values(module), expected)
    assert module.norms == pytest.approx(expected_norms)


def test_lightning_clips_in_manual_optimization(lightning, world, kind):
    trainer, module = lightning(kind, gradient_clip_val=None)
    module.automatic_optimization = False

    def training_step(batch):
        opt = module.optimizers()
        opt.zero_grad()
        module.manual_backward(module.net(**batch)["loss"])
        module.clip_gradients(opt, gradient_clip_val=LIMIT, gradient_clip_algorithm="norm")
        opt.step()

    module.training_step = training_step
    trainer.fit(module, loader(world))
    assert_same(values(module), own_loop(kind, world)[0])


def test_lightning_accumulates(lightning, world, kind):
    trainer, module = lightning(kind, accumulate_grad_batches=2)
    trainer.fit(module, loader(world, batch=BATCH // 2))
    assert_same(values(module), own_loop(kind, world)[0], atol=1e-5)


def test_lightning_refuses_to_clip_by_value(lightning, world, kind):
    trainer, module = lightning(kind, gradient_clip_algorithm="value")
    with pytest.raises(xc.UsageError, match="by value"):
        trainer.fit(module, loader(world))


def test_lightning_evaluates_the_master_weights(lightning, world, kind):
    trainer, module = lightning(kind)
    trainer.fit(module, loader(world), loader(world))
    assert_same(module.evaluated, values(module))
    trainer.test(module, loader(world), verbose=False)
    assert_same(module.evaluated, values(module))


def test_lightning_saves_master_weights_on_rank_0_and_resumes(lightning, world, kind, tmp_path):
    path = COMM.bcast(str(tmp_path / "last.ckpt"))
    trainer, module = lightning(kind)
    trainer.fit(module, loader(world))
    saved = torch.load(path, weights_only=False)["state_dict"]
    assert_same(values(module), [saved[name] for name, _ in module.named_parameters()])
    assert trainer.is_global_zero == (world.rank == 0)
    trainer, module = lightning(kind, max_epochs=2)
    trainer.fit(module, loader(world), ckpt_path=path)
    if kind is xc.SGD:  # another starts undisplaced after loading
        assert_same(values(module), own_loop(kind, world, epochs=2)[0])
    assert trainer.global_step == 2 * STEPS


# -- Without any of them ---------------------------------------------------------------------------------------------


def test_adapters_import_no_trainer(kind):
    code = "import sys, extrapcomm.integrations; print({'accelerate', 'transformers', 'lightning'} & set(sys.modules))"
    if COMM.size > 1:
        pytest.skip("one process is enough")
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"
