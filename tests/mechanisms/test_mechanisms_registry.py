"""Mechanisms by name and by import path, and what is said where there is none."""

import functools
import importlib
import sys

import pytest
from torch import nn

from twicing.mechanisms import Mechanism, Standard, Twicing, find_mechanism, known_mechanisms, register
from twicing.mechanisms.registry import name_of


@pytest.fixture
def own_package(tmp_path, monkeypatch):
    (tmp_path / "own_pkg").mkdir()
    (tmp_path / "own_pkg" / "__init__.py").write_text("")
    (tmp_path / "own_pkg" / "attention.py").write_text(
        "from twicing.mechanisms import Standard\n"
        "NUMBER = 3\n"
        "class NoModule: ...\n"
        "class MyAttention(Standard):\n"
        "    class Inner(Standard): ...\n"
        "def make(layer, num_heads, head_dim): return MyAttention(layer, num_heads, head_dim)\n"
    )
    (tmp_path / "own_pkg" / "unfinished.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_pkg"]:
        del sys.modules[name]


def test_the_published_mechanisms_are_registered():
    assert {"standard", "twicing"} <= set(known_mechanisms())
    assert find_mechanism("standard") is Standard
    assert find_mechanism("twicing") is Twicing


def test_an_import_path_leads_to_classes_inner_classes_and_functions(own_package):
    assert find_mechanism("own_pkg.attention:MyAttention").__name__ == "MyAttention"
    assert find_mechanism("own_pkg.attention:MyAttention.Inner").__name__ == "Inner"
    assert isinstance(find_mechanism("own_pkg.attention:make")(1, 2, 3), Mechanism)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "twicng",
            r"Unknown mechanism 'twicng': did you mean 'twicing'\? Known are .*'standard', 'twicing'.*\. Your own",
        ),
        ("zzz", r"Unknown mechanism 'zzz': known are .*'twicing'.*\. Your own goes by its import path, 'package\.file"),
        (
            "own_pkg.attention:",
            "An import path of a mechanism looks like 'package.file:Class': got 'own_pkg.attention:'",
        ),
        (":MyAttention", "looks like 'package.file:Class'"),
        ("own pkg:MyAttention", "looks like 'package.file:Class'"),
        ("no_pkg.attention:MyAttention", r"there is no module 'no_pkg' on Python's path \(PYTHONPATH=\. adds"),
        ("own_pkg.attenton:MyAttention", "there is no module 'own_pkg.attenton' on Python's path"),
        ("own_pkg.attention:MyAtention", "has no module 'MyAtention': did you mean 'MyAttention'"),
        ("own_pkg.attention:NUMBER", "is no mechanism: expected a subclass of torch.nn.Module, or a function .* got 3"),
        ("own_pkg.attention:NoModule", "is no mechanism: .* got <class 'own_pkg.attention.NoModule'>"),
    ],
)
def test_what_is_not_found_is_explained(name, message, own_package):
    with pytest.raises(ValueError, match=message):
        find_mechanism(name)


def test_a_module_that_lacks_another_one_says_which(own_package):
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        find_mechanism("own_pkg.unfinished:MyAttention")


def test_a_name_must_be_a_string():
    with pytest.raises(TypeError, match="A mechanism's name must be a string: got None, a NoneType"):
        find_mechanism(None)


@pytest.fixture
def forget(monkeypatch):
    from twicing.mechanisms import registry

    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def test_registering_ones_own(forget):
    @register("mine")
    class Mine(Standard):
        pass

    assert find_mechanism("mine") is Mine
    assert name_of(Mine) == "mine"
    assert known_mechanisms() == sorted(known_mechanisms())
    with pytest.raises(ValueError, match="did you mean 'mine'"):
        find_mechanism("mime")
    # A notebook's cell that is run again registers the same name for what is the same thing.
    register("mine")(Mine)


def test_a_name_is_taken_once(forget):
    with pytest.raises(ValueError, match=r"'twicing' is already registered, as twicing\.mechanisms\.twicing:Twicing"):
        register("twicing")(Standard)
    assert find_mechanism("twicing") is Twicing


@pytest.mark.parametrize("name", ["", "a:b"])
def test_a_name_is_no_import_path(name):
    with pytest.raises(ValueError, match="must not be empty or contain a colon"):
        register(name)


def test_what_can_be_found_again_has_a_name(own_package):
    assert name_of(Twicing) == "twicing"
    assert name_of(find_mechanism("own_pkg.attention:make")) == "own_pkg.attention:make"
    assert name_of(lambda *_: nn.Identity()) is None
    assert name_of(functools.partial(Twicing, order=3)) is None
