"""Which runtime a node computes with, as people write it: a name, and what that backend is given besides.

Must not know any runtime: whether one is installed, and what it takes, is found out in `real/backend.py`.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from isthmus.workloads.documents import parse
from isthmus.workloads.errors import InputError


class BackendSpec(BaseModel):
    """`openvino`, or `{name: onnxruntime, providers: [CUDAExecutionProvider]}`: other fields are its arguments."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(default="onnxruntime", description="as `isthmus backends` lists it, or module:Class")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string"}, handler(core)]}

    @classmethod
    def of(cls, text: str, *, where: object) -> BackendSpec:
        """From YAML in one line: a name, or `{name: …, …}`. InputError if it is neither."""
        try:
            return parse(cls, {"name": said} if isinstance(said := yaml.safe_load(text), str) else said, where=where)
        except yaml.YAMLError:
            raise InputError(f"{text!r} is not YAML", where=where, allowed="openvino, or {name: openvino, …}") from None

    @property
    def arguments(self) -> dict[str, Any]:
        """What it is given besides its name."""
        return dict(self.model_extra or {})

    @cached_property
    def key(self) -> str:
        """What tells it from others in names of files; empty for ONNX Runtime as it is by default."""
        if not self.arguments:
            return "" if self == DEFAULT else self.name.replace("/", "_")
        said = json.dumps(self.arguments, sort_keys=True, default=str)
        return f"{self.name.replace('/', '_')}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"

    def __str__(self) -> str:
        return json.dumps({"name": self.name, **self.arguments}, default=str) if self.arguments else self.name


DEFAULT = BackendSpec()
