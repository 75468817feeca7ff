"""The demo trains with every optimizer of its table."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import COMM

import extrapcomm.optim

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("rich")
digits = pytest.importorskip("digits")
torch.set_num_threads(1)

own_mpirun = pytest.mark.skipif(COMM.size > 1, reason="starts its own mpirun; runs in the plain suite")
DEMO = Path(digits.__file__)
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
    assert set(extrapcomm.optim.__all__) <= {recipe.optimizer for recipe in digits.RECIPES.values()}


def demo(*arguments):
    """The demo under an mpirun of its own."""
    command = ["mpirun", "-n", "2", sys.executable, str(DEMO), *arguments]
    return subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=100)


@own_mpirun
def test_demo_tells_the_accuracy_of_the_named_optimizer_and_of_sgd():
    ended = demo("--optimizer", "LAMB", "--epochs", "1")
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"^digits: LAMB [0-9.]+ %, SGD [0-9.]+ % test accuracy", ended.stdout, re.MULTILINE)


@own_mpirun
def test_demo_lists_its_optimizers_when_it_does_not_know_one():
    ended = demo("--optimizer", "lamp")
    assert ended.returncode != 0
    assert ended.stderr.count(f"'lamp' is none of {', '.join(digits.RECIPES)}") == 1
