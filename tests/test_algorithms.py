"""A rule is in every place where it belongs, and what the documents point at exists."""

import re
from pathlib import Path

import pytest
from reference import RULES

import extrapcomm as xc

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parent.parent
CLASSES = [getattr(xc, name) for name in xc.__all__ if isinstance(getattr(xc, name), type)]
OPTIMIZERS = [kind for kind in CLASSES if issubclass(kind, torch.optim.Optimizer)]


def document():
    path = ROOT / "docs" / "algorithms.md"
    if not path.exists():
        pytest.skip("the documents are not beside the tests")
    return path.read_text()


@pytest.mark.parametrize("rule", xc._core.rules())
def test_rule_has_a_class_a_reference_and_a_line_in_the_documents(rule):
    assert rule in {kind.RULE for kind in OPTIMIZERS}, "no class in extrapcomm/ has this RULE"
    assert rule in RULES, "tests/reference.py has no slow twin"
    assert f'(`"{rule}"`)' in document(), "docs/algorithms.md does not list it"


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_optimizer_is_in_the_documents_and_names_its_source(kind):
    assert f"`{kind.__name__}`" in document()
    assert kind.__doc__ and ("Source:" in kind.__doc__ or "torch.optim" in kind.__doc__)


@pytest.mark.parametrize("kind", xc._core.extrapolations())
def test_displacement_is_in_the_documents(kind):
    assert f'| `"{kind}"` |' in document()


def test_tests_that_the_documents_name_exist():
    texts = {path.stem: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    for module, names in re.findall(r"(test_\w+):\s+((?:`test_\w+`(?:, )?)+)", document()):
        for name in re.findall(r"`(test_\w+)`", names):
            assert f"def {name}(" in texts[module], f"{module} has no {name}"
    for module in set(re.findall(r"\btest_[a-z_]+\b(?=[ ,|:;)\n])", document())):
        assert any(module in (stem, *re.findall(r"def (test_\w+)", text)) for stem, text in texts.items()), (
            module
        )
