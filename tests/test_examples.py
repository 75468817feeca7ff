"""The demo trains with every optimizer of its table."""

import os
import re
import subprocess
import sys

import pytest
from conftest import COMM

import extrapcomm as xc

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("rich")
digits = pytest.importorskip("digits")
torch.set_num_threads(1)

SHORT = ["--workers", "2", "--batch", "8", "--epochs", "2", "--warmup", "1"]


@pytest.fixture(scope="module")
def data():
    return digits.digits()


@pytest.mark.parametrize("name", digits.RECIPES)
def test_demo_learns_with_every_optimizer(name, worlds, data, monkeypatch):
    """A few short epochs are enough to leave the tenth behind that guessing gives."""
    monkeypatch.setattr(sys, "argv", ["digits.py", "--optimizer", name, *SHORT])
    args = digits.options()
    recipe = digits.entrants(args)[name]
    percent = COMM.bcast(digits.run(name, recipe, args, worlds(args.workers), *data))
    assert percent > 40


def test_demo_has_a_recipe_for_every_optimizer_of_the_library():
    exported = {name: getattr(xc, name) for name in xc.__all__}
    optimizers = {name for name, each in exported.items() if is_optimizer(each)}
    assert optimizers == {recipe.optimizer for recipe in digits.RECIPES.values()}


def is_optimizer(exported):
    return isinstance(exported, type) and issubclass(exported, torch.optim.Optimizer)


@pytest.mark.own_mpirun
def test_demo_tells_the_accuracy_of_the_named_optimizer_and_of_sgd():
    command = ["mpirun", "-n", "2", sys.executable, digits.__file__, "--optimizer", "LAMB", "--epochs", "1"]
    ended = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"^digits: LAMB [0-9.]+ %, SGD [0-9.]+ % test accuracy", ended.stdout, re.MULTILINE)


def test_demo_lists_its_optimizers_when_it_does_not_know_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["digits.py", "--optimizer", "lamp"])
    with pytest.raises(SystemExit, match="2"):
        digits.options()
    told = f"'lamp' is none of {', '.join(digits.RECIPES)}"
    assert capsys.readouterr().err.count(told) == (COMM.rank == 0)
