"""How long a part takes on a node: measured, scaled from measured, or synthetic. Knows no queue.

All three answer the same questions: the mean of a part, the means of all spans at once, and one draw. A draw is a
function of (seed, node, request), never of the order in which it is asked for.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from isthmus.workloads.errors import InputError
from isthmus.workloads.model import Model, Part, members
from isthmus.workloads.profile import Profile
from isthmus.workloads.quantiles import Law
from isthmus.workloads.random import Uniforms
from isthmus.workloads.units import Seconds


class Service(Protocol):
    """Service times of one model on one node."""

    @property
    def provenance(self) -> str:
        """Where the numbers come from: measured, scaled, synthetic; with the machine where there is one."""

    @property
    def varies(self) -> bool:
        """Whether two draws of one part can differ."""

    def mean_s(self, part: Part) -> float:
        """Mean seconds of one part."""

    def span_s(self) -> npt.NDArray[np.float64]:
        """Mean seconds of every span: entry [i, j] is blocks i to j-1, 0 where i >= j."""

    def load_s(self, part: Part) -> float:
        """Seconds until a part that is not resident can run."""

    def draw_s(self, part: Part, noise: Uniforms, number: int) -> float:
        """Seconds of one part in the run's request `number`."""

    def batch_factor(self, size: int) -> float:
        """How many times longer a batch takes than one request. InputError where that is not known."""


# Samples taken one after another are alike (lag-1 autocorrelation 0.2-0.7), so residuals are resampled in blocks.
_BLOCK = 10


class Measured:
    """A profile's means times `slowdown`, with its residuals resampled in blocks of consecutive samples."""

    def __init__(self, model: Model, profile: Profile, slowdown: float) -> None:
        profile.check_model(model)
        self.model, self.profile, self.slowdown = model, profile, slowdown
        self._means = lru_cache(maxsize=None)(self._mean_s)
        self._residuals = lru_cache(maxsize=None)(self._residuals_of)

    def __reduce__(self) -> tuple[object, ...]:
        return Measured, (self.model, self.profile, self.slowdown)

    @property
    def provenance(self) -> str:
        label = self.profile.machine.label
        return f"measured on {label}" if self.slowdown == 1 else f"scaled ×{self.slowdown:g} from {label}"

    @property
    def varies(self) -> bool:
        return True

    def mean_s(self, part: Part) -> float:
        return self._means(part)

    def _mean_s(self, part: Part) -> float:
        return self.slowdown * self.profile.part_s(self.model, part)

    @cached_property
    def _spans(self) -> npt.NDArray[np.float64]:
        return _read_only(self.slowdown * self.profile.span_s())

    def span_s(self) -> npt.NDArray[np.float64]:
        return self._spans

    def load_s(self, part: Part) -> float:
        return self.slowdown * self.profile.load_s(self.model, part)

    def _residuals_of(self, part: Part) -> npt.NDArray[np.float64]:
        return self.profile.residuals(self._means(part) / self.slowdown)

    def draw_s(self, part: Part, noise: Uniforms, number: int) -> float:
        residuals = self._residuals(part)
        if len(residuals) == 0:
            return self._means(part)
        start = int(noise[number // _BLOCK] * len(residuals))
        return self._means(part) * (1 + float(residuals[(start + number % _BLOCK) % len(residuals)]))

    def batch_factor(self, size: int) -> float:
        return self.profile.batch_factor(size)


class SyntheticSpec(Law):
    """A made-up service time of the whole model. A part costs its share of the model's FLOPs."""

    mean: Seconds = Field(gt=0)
    load: Seconds = Field(
        default=0.0, description="to load the whole model where `memory` is limited; a part costs its share by bytes"
    )


class Synthetic:
    """Service times of a given distribution, for theory and for hardware that is imagined."""

    def __init__(self, model: Model, spec: SyntheticSpec) -> None:
        self.model, self.spec = model, spec
        # A model of nothing but moving data around has no FLOPs: then its layers share alike.
        self._weights = [layer.flop if model.flop else 1 for layer in model.layers]
        self._means = {model.everything: spec.mean}
        self._quantile = spec.quantile

    @property
    def provenance(self) -> str:
        return f"synthetic, {self.spec.distribution}"

    @property
    def varies(self) -> bool:
        return self.spec.distribution != "constant"

    def mean_s(self, part: Part) -> float:
        found = self._means.get(part.layers)
        if found is None:
            weight = sum(self._weights[i] for i in members(part.layers))
            found = self._means[part.layers] = self.spec.mean * weight / sum(self._weights)
        return found

    @cached_property
    def _spans(self) -> npt.NDArray[np.float64]:
        blocks = [sum(self._weights[i] for i in members(block)) for block in self.model.blocks]
        until = np.concatenate([[0.0], np.cumsum(blocks)])
        spans = np.triu(until[None, :] - until[:, None], k=1) * (self.spec.mean / sum(self._weights))
        return _read_only(spans)

    def span_s(self) -> npt.NDArray[np.float64]:
        return self._spans

    def load_s(self, part: Part) -> float:
        if not self.spec.load or not self.model.parameter_bytes:
            return self.spec.load
        return self.spec.load * self.model.weights_bytes(part) / self.model.parameter_bytes

    def draw_s(self, part: Part, noise: Uniforms, number: int) -> float:
        return self.mean_s(part) * self._quantile(noise[number])

    def batch_factor(self, size: int) -> float:
        raise InputError(
            "what a batch costs is not known of made-up times", allowed="with `cost`, such as [[1, 1.0], [8, 3.2]]"
        )


def _read_only(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    values.flags.writeable = False  # views hand it to policies
    return values
