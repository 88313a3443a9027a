"""New versions of models that come while requests go on: other weights, the same structure. Knows no shell.

Plans, profiles and messages are about the structure, so they hold for every version.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from isthmus.workloads.errors import InputError, within
from isthmus.workloads.model import Layer, Model, load_model
from isthmus.workloads.units import Seconds


class UpdateSpec(BaseModel):
    """From `at` on the model is rolled out as the file `to` has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    to: str = Field(description="a file.onnx with the same layers, tensors and shapes, and other weights")
    at: Seconds

    def resolved(self, folder: Path) -> UpdateSpec:
        """With an absolute path; `folder` is what a relative one starts from."""
        file = folder / self.to
        return self.model_copy(update={"to": str(file.resolve())}) if file.is_file() else self


@dataclass(frozen=True)
class Update:
    """A version of a model, called as the one that it comes after, and when."""

    model: Model
    at_s: float


def load_update(spec: UpdateSpec, now: Model, where: object) -> Update:
    """InputError, naming `where`, when the file is no other version of the model that there is now."""
    with within(where):
        to = load_model(spec.to, name=now.name)
        if to.sha256 == now.sha256:
            raise InputError(f"{spec.to} is what {now.name} is already", allowed="a file with other weights")
        if (other := _difference(now, to)) is not None:
            raise InputError(
                f"{spec.to} has {other}",
                allowed=f"the layers, tensors and shapes of {now.name}: only weights may differ",
            )
    return Update(to, spec.at)


def in_order(updates: Iterable[Update]) -> list[Update]:
    """As they come."""
    return sorted(updates, key=lambda update: update.at_s)


def _difference(old: Model, new: Model) -> str | None:
    """The first thing in which two structures differ, as the new one has it."""
    if len(new.layers) != len(old.layers):
        return f"{len(new.layers)} layers, not {len(old.layers)}"
    for name, tensor in new.tensors.items():
        before = old.tensors.get(name)
        if before is None:
            return f"a tensor {name!r}, which is new"
        if (tensor.shape, tensor.dtype) != (before.shape, before.dtype):
            shapes = [f"{it.dtype} {list(it.shape)}" for it in (tensor, before)]
            return f"the tensor {name!r} as {shapes[0]}, not {shapes[1]}"
    for mine, its in zip(old.layers, new.layers, strict=True):
        if _shape(mine) != _shape(its):
            return f"another layer {its.index} ({its.name}, {its.op})"
    if (new.inputs, new.outputs) != (old.inputs, old.outputs):
        return "other inputs or outputs"
    return None


def _shape(layer: Layer) -> tuple[object, ...]:
    """All of a layer but what it is called."""
    return layer.op, layer.inputs, layer.outputs, layer.flop, layer.parameter_bytes
