"""Finding a policy by name: entry points of installed packages, or `module:Class`. Knows no policy by itself."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from isthmus.policies.contract import Policy
from isthmus.workloads.errors import InputError, unknown

GROUP = "isthmus.policies"


@dataclass(frozen=True)
class PolicySpec:
    """A policy as an experiment names it, with what its constructor is given. `label` tells it apart in tables."""

    name: str
    arguments: Mapping[str, Any]
    label: str

    def make(self, seed: int) -> Policy:
        """A fresh policy. A constructor that takes `seed` is given this one, unless the experiment gave one.

        InputError for an unknown name (with the nearest ones) or for arguments that the policy does not take.
        """
        factory, takes_seed = self._factory
        try:
            policy = factory(**({"seed": seed, **self.arguments} if takes_seed else self.arguments))
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"policy {self.name!r} cannot be made: {_one_line(error)}") from error
        if not callable(getattr(policy, "decide", None)):
            raise InputError(f"policy {self.name!r} has no method decide(request, view)")
        return policy  # type: ignore[no-any-return]

    @cached_property
    def _factory(self) -> tuple[Any, bool]:
        """What makes it, and whether that takes a seed; looked for once, for however many sources."""
        factory = find(self.name)
        signature = inspect.signature(factory)
        takes_seed = "seed" in signature.parameters
        try:
            signature.bind(**({"seed": 0, **self.arguments} if takes_seed else self.arguments))
        except TypeError as error:
            allowed = ", ".join(signature.parameters) or "it takes no arguments"
            raise InputError(f"policy {self.name!r}: {error}", allowed=allowed) from None
        return factory, takes_seed


def spec(entry: str | Mapping[str, Any]) -> PolicySpec:
    """`"fixed"`, or `{"fixed": {"cut": 5}}`; `{"fixed": {"cut": 5, "label": "fixed@5"}}` names it in tables."""
    if isinstance(entry, str):
        return PolicySpec(entry, {}, entry)
    if len(entry) != 1:
        raise InputError(
            f"{dict(entry)!r} is not a policy",
            allowed="a name, or one name with its arguments: {fixed: {cut: 5}}",
        )
    [(name, given)] = entry.items()
    if not isinstance(given, Mapping):
        raise InputError(f"policy {name!r}: {given!r} are not arguments", allowed="name: value pairs")
    arguments = dict(given)
    inner = ", ".join(f"{k}={v}" for k, v in arguments.items() if k != "label")
    label = str(arguments.pop("label", f"{name}({inner})" if inner else name))
    return PolicySpec(name, arguments, label)


@lru_cache(maxsize=1)
def installed() -> dict[str, EntryPoint]:
    """Every installed policy by name. InputError when two packages claim the same name."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise InputError(
                f"policy {point.name!r} is claimed twice: by {_package(other)} ({other.value}) "
                f"and by {_package(point)} ({point.value}); uninstall one"
            )
    return found


def find(name: str) -> Any:
    """The class or function that makes a policy."""
    if ":" in name:
        # An entry point that nobody had to install.
        point, origin = EntryPoint(name, name, GROUP), ""
    elif name in installed():
        point = installed()[name]
        origin = f" of {_package(point)}"
    else:
        raise unknown("policy", name, [*installed(), "module:Class"])
    try:
        factory = point.load()
    except Exception as error:  # whatever importing somebody's module may raise
        text = _one_line(error)
        raise InputError(f"policy {name!r}{origin} cannot be loaded: {text}", allowed="module:Class") from error
    if not callable(factory):
        raise InputError(f"policy {name!r}{origin} is no class or function, but {factory!r}")
    return factory


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown package"


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
