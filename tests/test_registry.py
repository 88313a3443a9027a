"""Policies by name: from entry points of installed packages, or from a module."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from isthmus.policies import registry
from isthmus.policies.registry import spec
from isthmus.policies.static import Fixed
from isthmus.workloads.errors import InputError

BUILT_IN = {"local", "remote", "fixed", "random", "neurosurgeon", "least-delay", "oracle"}


@pytest.fixture(autouse=True)
def _fresh():
    registry.installed.cache_clear()
    yield
    registry.installed.cache_clear()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A package with policies, as pip would leave it on the path."""

    def put(package: str, module: str, **policies: str) -> None:
        folder = tmp_path / package
        info = folder / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        points = "\n".join(f"{name} = {package}_mod:{factory}" for name, factory in policies.items())
        (info / "entry_points.txt").write_text(f"[isthmus.policies]\n{points}\n")
        (folder / f"{package}_mod.py").write_text(module)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, f"{package}_mod", raising=False)

    return put


MODULE = """
from isthmus.policies.static import Local

class Mine(Local):
    def __init__(self, weight=1.0, *, seed):
        self.weight, self.seed = weight, seed

class NoPolicy:
    pass

class Breaks:
    def __init__(self):
        raise ValueError("no luck\\ntoday")

number = 5
"""


def test_every_built_in_policy_can_be_made():
    assert set(registry.installed()) >= BUILT_IN
    for name in BUILT_IN:
        assert callable(spec(name).make(1).decide)


def test_a_policy_of_another_package_is_found_and_given_the_seed(install):
    install("alpha", MODULE, mine="Mine")
    made = spec({"mine": {"weight": 2}}).make(11)
    assert (type(made).__name__, made.weight, made.seed) == ("Mine", 2, 11)
    assert spec({"mine": {"seed": 3}}).make(11).seed == 3


def test_one_name_claimed_by_two_packages_is_an_error_that_names_both(install):
    install("alpha", MODULE, mine="Mine")
    install("beta", MODULE, mine="Mine")
    with pytest.raises(InputError, match=r"policy 'mine' is claimed twice") as caught:
        spec("local").make(1)
    for said in ("alpha (alpha_mod:Mine)", "beta (beta_mod:Mine)"):
        assert said in str(caught.value)


def test_a_module_and_class_need_no_installation(install):
    install("alpha", MODULE)
    assert spec({"alpha_mod:Mine": {"weight": 4}}).make(1).weight == 4
    assert type(spec("isthmus.policies.static:Fixed").make(1)) is Fixed


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("neurosurgon", "unknown policy 'neurosurgon'; did you mean neurosurgeon"),
        ("nothing-like-it", "allowed: .*least-delay.*module:Class"),
        ("", "unknown policy ''"),
        ("no_such_module:Class", "cannot be loaded: ModuleNotFoundError: .*no_such_module"),
        ("isthmus.policies.static:Classy", "cannot be loaded: AttributeError: .*Classy"),
        (":Class", "cannot be loaded"),
        (".static:Local", "cannot be loaded"),
        ("isthmus.policies.static:", "cannot be loaded|no class"),
        ("alpha_mod:number", "is no class or function, but 5"),
        ("alpha_mod:NoPolicy", r"has no method decide\(request, view\)"),
        ("alpha_mod:Breaks", "cannot be made: ValueError: no luck today"),
        ("broken_mod:Any", "cannot be loaded: SyntaxError"),
        ("bad", "policy 'bad' of beta cannot be loaded: AttributeError"),
        ({"fixed": {"cutt": 5}}, "policy 'fixed': got an unexpected keyword argument 'cutt' .*allowed: cut, server"),
        ({"local": {"cut": 5}}, "policy 'local': .*allowed: it takes no arguments"),
        ({"fixed": 5}, "policy 'fixed': 5 are not arguments"),
        ({"fixed": {}, "local": {}}, "is not a policy"),
        ({}, "is not a policy"),
        ({"neurosurgeon": {"objective": "speed"}}, "no objective 'speed'"),
    ],
)
def test_what_cannot_be_found_or_made_says_why(install, entry, said):
    install("alpha", MODULE)
    install("broken", "class Any(:")
    install("beta", MODULE, bad="NotThere")
    with pytest.raises(InputError, match=said) as caught:
        spec(entry).make(1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "label", "arguments"),
    [
        ("fixed", "fixed", {}),
        ({"fixed": {"cut": 5}}, "fixed(cut=5)", {"cut": 5}),
        ({"fixed": {"cut": 5, "server": "edge"}}, "fixed(cut=5, server=edge)", {"cut": 5, "server": "edge"}),
        ({"fixed": {"cut": 5, "label": "half"}}, "half", {"cut": 5}),
        ({"fixed": {"label": "half"}}, "half", {}),
    ],
)
def test_a_label_tells_policies_apart_and_is_no_argument(entry, label, arguments):
    found = spec(entry)
    assert (found.name, found.label, dict(found.arguments)) == ("fixed", label, arguments)
    found.make(1)


def test_the_policies_that_are_installed_are_the_ones_that_the_project_declares():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for name in BUILT_IN:
        assert f'\n{name} = "isthmus.policies.' in text
