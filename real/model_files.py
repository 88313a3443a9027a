"""Model files on other machines: sent once, kept by their hash. Knows models as files; must not know Ray.

A node never runs a model of another hash than the driver's. What comes by name is built where it is needed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from isthmus.workloads import onnx_file
from isthmus.workloads.errors import InputError, RunFailure
from isthmus.workloads.model import Model, sha256_here

Files = Mapping[str, bytes]
"""What a model is made of, by name; the first is the ONNX file. Empty for a model that comes by name."""


def packed(model: Model) -> Files:
    """The files of a model, to send. InputError if they are no longer those that it was loaded from."""
    path = Path(model.source)
    if not path.is_file():
        return {}
    if sha256_here(model) != model.sha256:
        raise InputError("has changed since it was loaded", where=path, allowed="the same file until the run ends")
    files = {path.name: path.read_bytes()}
    for location in onnx_file.external_files(path):
        files[location] = onnx_file.beside(path, location).read_bytes()
    return files


def unpacked(model: Model, files: Files) -> Model:
    """The model as this machine has it: its own file if that is the same, else a copy of `files` in the user's cache.

    RunFailure when neither has the model's hash.
    """
    try:
        if sha256_here(model) == model.sha256:
            return model
    except InputError:
        pass
    folder = _cache() / model.sha256
    path = folder / next(iter(files), "")
    if files and not path.is_file():
        for name, content in reversed(list(files.items())):  # the ONNX file last: with it the model is whole
            target = folder / name
            if not target.resolve().is_relative_to(folder.resolve()):
                raise RunFailure(f"model {model.name!r} names a file outside its folder: {name[:80]!r}")
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}.{os.getpid()}")
            partial.write_bytes(content)
            os.replace(partial, target)
    here = replace(model, source=str(path))
    if not files or sha256_here(here) != model.sha256:
        raise RunFailure(f"model {model.name!r} is another on {os.uname().nodename} than on the driver's machine")
    return here


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isthmus" / "models"
