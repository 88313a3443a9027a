"""What a request costs besides computing and moving bytes, as calibration measured it. Knows no node.

Times are this machine's; a node that is emulated `slowdown` times slower pays them times its slowdown, except where
the field says otherwise.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from isthmus.workloads.documents import parse, read_yaml, write_text


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CodecCost(_Spec):
    """Seconds to encode and to decode: a constant, and so much per byte of the tensor as it was."""

    encode_s: float = Field(ge=0)
    encode_s_per_byte: float = Field(ge=0)
    decode_s: float = Field(ge=0)
    decode_s_per_byte: float = Field(ge=0)


class Overheads(_Spec):
    """Measured by `isthmus calibrate`; all zero where nothing was measured."""

    schema_version: int = 1
    measured: str = Field(default="", description="when and where; empty where nothing was measured")
    codecs: dict[str, CodecCost] = {}
    decide_s: dict[str, float] = Field(default={}, description="CPU seconds of one decision, by policy")
    wake_s: float = Field(default=0.0, description="how much later than asked for an answer is released; wall time")
    actor_call_s: float = Field(default=0.0, description="an empty call from actor to actor; hidden by emulated links")
    hand_over_s_per_byte: float = Field(default=0.0, description="the same, per byte of tensor")

    @classmethod
    def find(cls, store: Path) -> Overheads:
        """The overheads kept beside the profiles, or none."""
        path = store / "overheads.json"
        return parse(cls, read_yaml(path), where=path) if os.path.exists(path) else cls()

    def save(self, store: Path) -> None:
        write_text(store / "overheads.json", self.model_dump_json(indent=1) + "\n")

    def encode_s(self, codec: str, tensor_bytes: float) -> float:
        cost = self.codecs.get(codec)
        return 0.0 if cost is None else cost.encode_s + cost.encode_s_per_byte * tensor_bytes

    def decode_s(self, codec: str, tensor_bytes: float) -> float:
        cost = self.codecs.get(codec)
        return 0.0 if cost is None else cost.decode_s + cost.decode_s_per_byte * tensor_bytes
