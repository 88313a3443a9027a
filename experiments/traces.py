"""The rates of links, looked at: figures, a picture of a line, a chart. Knows what names a rate; runs nothing.

Figures are shares of time over one period; a rate that does not repeat counts its last value as long as the one
before. No model and no profile is needed to look at the links of a testbed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from isthmus.workloads.documents import parse, write_text
from isthmus.workloads.errors import InputError
from isthmus.workloads.experiment import read_testbed
from isthmus.workloads.links import named_media
from isthmus.workloads.rate import Rate
from isthmus.workloads.rates import Drawn, RateSpec
from isthmus.workloads.testbed import TestbedSpec, realise_links
from isthmus.workloads.trace_file import TraceFile, format_of

Floats = npt.NDArray[np.float64]

POINTS = 4000
"""Of a rate that are drawn; longer ones are shown as means of as many windows."""
_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Trace:
    """A rate with its name, and what it comes from: the kind, and the file or the seed."""

    name: str
    kind: str
    rate: Rate


def find_traces(path: str | Path, *, seed: int | None = None, **columns: str | None) -> list[Trace]:
    """The rates of every link of a testbed or experiment (.yaml, .yml), or the one in a trace file.

    `seed` is that of rates that are drawn: by default the experiment's first one, or 1. `columns` are what a trace
    file needs besides: `time`, `rate`, `unit` (workloads/trace_file.py). InputError says what is wrong, and where.
    """
    path = Path(path)
    given = {name: value for name, value in columns.items() if value is not None}
    if path.suffix.lower() not in (".yaml", ".yml"):
        spec = parse(TraceFile, {"file": path.name} | given, where=path)
        rate = spec.realise(path.parent)  # before its format is asked for: what is wrong is found here
        return [Trace(path.name, format_of(path), rate)]
    if given:
        raise InputError("names the columns of its traces itself", where=path, allowed=f"no --{next(iter(given))}")
    testbed, experiment = read_testbed(path)
    seeds = (1,) if experiment is None else experiment.seeds
    return _of_links(testbed, path, seeds[0] if seed is None else seed)


def _of_links(testbed: TestbedSpec, path: Path, seed: int) -> list[Trace]:
    """Both directions of every link and then of every medium; as one where they are the same rate.

    Of a group with drawn rates, its first. A link that has no rate of its own is left to its medium.
    """
    links = realise_links(testbed, folder=path.parent, where=path, seed=seed)
    found = []
    for link in testbed.links:
        (there, (rate, *_)), (back, (rate_back, *_)) = testbed.directed(link)
        if rate is not None and links[there[0]].rate == links[back[0]].rate:
            found.append(Trace(" ⇄ ".join(link.between), _kind(rate, seed), links[there[0]].rate))
            continue
        for ends, ways, spec in ((link.between, there, rate), (link.between[::-1], back, rate_back)):
            if spec is not None:
                named = ways[0] if isinstance(spec, Drawn) else ends
                found.append(Trace(" → ".join(named), _kind(spec, seed), links[ways[0]].rate))
    media = {link.medium.name: link.medium.rate for link in links.values() if link.medium is not None}
    return found + [Trace(name, _kind(rate, seed), media[name]) for name, rate in named_media(testbed.media)]


def _kind(rate: RateSpec, seed: int) -> str:
    if isinstance(rate, TraceFile):
        return f"trace {Path(rate.file).name}"
    return f"{rate.kind}, seed {seed}" if isinstance(rate, Drawn) else rate.kind


def summary(trace: Trace) -> dict[str, Any]:
    """Duration in seconds (None where it is constant), rates in bytes per second, share of time in outage."""
    rate = trace.rate
    starts, rates = rate.pieces(_span_s(rate))
    lengths = np.diff(starts, append=_span_s(rate))
    order = np.argsort(rates, kind="stable")
    share = np.cumsum(lengths[order]) / lengths.sum()
    below = np.minimum(np.searchsorted(share, [0.05, 0.5, 0.95]), len(rates) - 1)
    percentiles = zip((5, 50, 95), rates[order][below].tolist(), strict=True)
    return {
        "name": trace.name,
        "kind": trace.kind,
        "duration_s": None if rate.is_constant else _span_s(rate),
        "mean_bytes_per_s": rate.mean_bytes_per_s,
        **{f"p{p}_bytes_per_s": value for p, value in percentiles},
        "lowest_bytes_per_s": float(rates.min()),
        "outage_share": float(lengths[rates == 0].sum() / lengths.sum()),
    }


def sparkline(rate: Rate, width: int = 24) -> str:
    """One block per equal window of time, as high as its mean rate; a blank is an outage."""
    means = _window_means(rate, _span_s(rate), width)
    levels = np.ceil(means / means.max() * len(_BLOCKS)).astype(int)
    return "".join(_BLOCKS[level - 1] if level else " " for level in np.minimum(levels, len(_BLOCKS)))


def sampled(rate: Rate, until_s: float) -> tuple[Floats, Floats]:
    """Starts and rates to draw, at most POINTS: the pieces themselves, or means of equal windows where they are more.

    Nothing at or after `until_s`.
    """
    starts, rates = rate.pieces(until_s)
    if len(starts) <= POINTS:
        return starts, rates
    return np.linspace(0, until_s, POINTS, endpoint=False), _window_means(rate, until_s, POINTS)


def write_plot(path: str | Path, traces: Sequence[Trace]) -> None:
    """All rates in one chart, over one period of each: an HTML file that opens without a network.

    InputError when it is not called .html. Needs the `report` extra.
    """
    if Path(path).suffix.lower() != ".html":
        raise InputError("is no HTML file", where=path, allowed="a name that ends in .html")
    import plotly.graph_objects as go

    figure = go.Figure()
    for trace in traces:
        end_s = _span_s(trace.rate)
        times, rates = sampled(trace.rate, end_s)
        figure.add_scatter(
            x=[*times.tolist(), end_s], y=[*(rates * 8e-6).tolist(), rates[-1] * 8e-6],
            name=f"{escape(trace.name)} ({escape(trace.kind)})", mode="lines", line={"shape": "hv", "width": 1.5},
            hovertemplate="%{y:.4g} Mbit/s at %{x:.4g} s",
        )  # fmt: skip
    figure.update_layout(
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 12, "color": "#333"},
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )
    figure.update_xaxes(title="time, s", automargin=True)
    figure.update_yaxes(title="Mbit/s", rangemode="tozero", automargin=True)
    config = {"responsive": True, "displaylogo": False, "toImageButtonOptions": {"format": "svg"}}
    write_text(path, figure.to_html(include_plotlyjs=True, div_id="rates", config=config))


def _span_s(rate: Rate) -> float:
    """The time in which a rate shows all that it has; a second where it never changes."""
    if rate.period_s is not None:
        return rate.repeat_from_s + rate.period_s
    return 1.0 if len(rate.starts_s) == 1 else 2 * rate.starts_s[-1] - rate.starts_s[-2]


def _window_means(rate: Rate, until_s: float, count: int) -> Floats:
    """Mean rates of `count` equal windows from 0 on, shape (count,)."""
    starts, rates = rate.pieces(until_s)
    edges = np.append(starts, until_s)
    moved = np.concatenate([[0.0], np.cumsum(np.diff(edges) * rates)])
    windows = np.linspace(0, until_s, count + 1)
    means = np.diff(np.interp(windows, edges, moved)) / np.diff(windows)
    return np.asarray(np.where(means > 1e-9 * rates.max(), means, 0.0))  # an outage is one in spite of roundings
