"""Reports: one HTML file that says what a comparison or a run found. It opens without a network, and has no date.

Knows run folders, comparisons and how to draw them. Computes no statistic of its own beyond what it draws. Everything
that people named (policies, nodes, files) is escaped, for HTML and for plotly, which reads tags in its labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.colors import sample_colorscale
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from isthmus.experiments.compare import PERCENTILES, Comparison, breakdown, merge
from isthmus.experiments.places import group_of, link_rows, node_rows
from isthmus.experiments.run_folder import Run
from isthmus.experiments.traces import sampled
from isthmus.policies.records import Kind, Outcome
from isthmus.workloads.documents import write_text
from isthmus.workloads.links import Link
from isthmus.workloads.rate import Rate
from isthmus.workloads.routing import LinkId
from isthmus.workloads.units import show_bytes

SIMULATED, REAL = "#2f6db5", "#d9772b"
"""The colours of the two worlds, here and in the template."""

_HUES = {
    Kind.COMPUTE: ("#1f6663", "#bfe0dc"),
    Kind.WAIT: ("#b07c00", "#f7e4b0"),
    Kind.SEND: ("#4b4e9b", "#d3d5ef"),
    Kind.ENCODE: ("#96406c", "#e3bcd0"),
    Kind.DECODE: ("#6d3f80", "#d4bbde"),
    Kind.DECIDE: ("#b8321f", "#f0b8b0"),
    Kind.LOAD: ("#5f432f", "#d0bba9"),
}
"""Every kind a hue; its places are shades of it, from the first of the testbed to the last."""
_OTHER = "#9a9a9a"
_SMALL = 0.005  # of the longest bar: what never is longer is drawn together with its like

_RATES = 6  # links whose rates are drawn; of more nobody could tell which is which
_COURSE = 200  # bins of a run's course
_UNITS = ((3600, "h"), (60, "min"), (1, "s"))
_LINES = ["#2f6db5", "#d9772b", "#3a8f5c", "#96406c", "#b8321f", "#5f432f", "#6d3f80", "#888888"]
_TURNS = 200  # changes of a rate that repeats, about: no more turns of it are shown
_POINTS = 400  # of a distribution that are drawn; the tail is kept


@dataclass(frozen=True)
class _World:
    """One run as a column of the report."""

    run: Run
    colour: str
    title: str

    @property
    def name(self) -> str:
        return self.run.world


def write_report(path: str | Path, subjects: Sequence[Comparison | Run], *, title: str = "Isthmus") -> None:
    """Write one HTML file: a section per comparison, or per single run of any world.

    A merged comparison gives a section for each of its parts. RunFailure when the file cannot be written.
    """
    flat = [s for subject in subjects for s in (getattr(subject, "parts", ()) or (subject,))]
    comparisons = [s for s in flat if isinstance(s, Comparison)]
    charts = _Charts()
    sections = [_section(number, subject, charts) for number, subject in enumerate(flat, 1)]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"ms": _ms, "percent": _percent, "bytes": show_bytes}
    html = environment.get_template("report.html.j2").render(
        title=title,
        sections=sections,
        comparison=merge(comparisons) if comparisons else None,
        worlds=list(dict.fromkeys(world.name for s in sections for world in s["worlds"])),
        colours={"simulated": SIMULATED, "real": REAL},
        percentiles=PERCENTILES,
        plotly=Markup(get_plotlyjs()),
    )
    write_text(path, html)


def _section(number: int, subject: Comparison | Run, charts: _Charts) -> dict[str, Any]:
    """What the template shows of one comparison or run."""
    if isinstance(subject, Run):
        comparison = None
        runs = {"run": subject}
    else:
        comparison = subject
        given = {"simulated": subject.simulated, "real": subject.real, "repeat": subject.repeat}
        runs = {title: run for title, run in given.items() if run is not None}
    shown = [
        _World(run, SIMULATED if run.world == "simulated" else REAL, title)
        for title, run in runs.items()
        if title != "repeat"
    ]
    spec = shown[0].run.experiment
    policies = list(dict.fromkeys(p for world in shown for p in world.run.requests["policy"].unique()))
    oracles = {p for run in runs.values() for p in run.facts.get("oracles", [])}
    results = [_results(policy, shown) for policy in policies]
    return {
        "number": number,
        "name": spec.name,
        "workload": [
            {
                "node": source.node,
                "model": source.model,
                "arrivals": source.arrivals.kind + _pace(getattr(source.arrivals, "rate", None)),
            }
            for source in spec.workload
        ],
        "seeds": spec.seeds,
        "worlds": shown,
        "outcomes": [o for o in map(str, Outcome) if any(o in r["outcomes"] for of in results for r in of["worlds"])],
        "results": results,
        "oracles": oracles,
        "fidelity": None if comparison is None else comparison.to_json(),
        "distributions": [(p, _distribution(p, shown, charts)) for p in policies],
        "course": _course(policies, shown[0].run, charts),
        "breakdown": _where_time_went(policies, shown, charts),
        "nodes": node_rows(shown[0].run),
        "links": link_rows(shown[0].run),
        "rates": _rates(shown[0].run, charts),
        "rates_drawn": shown[0].run.testbed.at_seed(spec.seeds[0]) is not shown[0].run.testbed,
        "provenance": _provenance(runs),
        "updates": [
            (world, row, _answers(world.run, row)) for world in shown for row in world.run.facts.get("updates", [])
        ],
        "experiment": yaml.safe_dump(
            {k: v for k, v in shown[0].run.facts["experiment"].items() if k != "name"}, sort_keys=False
        ),
    }


def _answers(run: Run, update: Mapping[str, Any]) -> dict[str, int]:
    """What both versions of an update answered, under its policy and seed."""
    requests = run.requests
    of = (requests["policy"] == update["policy"]) & (requests["seed"] == update["seed"])
    of &= requests["model"] == update["model"]
    return {which: int((of & (requests["version"] == update[which])).sum()) for which in ("from", "to")}


def _pace(per_s: float | None) -> str:
    if per_s is None:
        return ""
    return f", {per_s:g} per second" if per_s >= 0.1 else f", {3600 * per_s:.4g} per hour"


def _results(policy: str, worlds: Iterable[_World]) -> dict[str, Any]:
    rows = []
    for world in worlds:
        of = world.run.requests[world.run.requests["policy"] == policy]
        latency = of["latency_s"]
        row = {"world": world, "requests": len(of), "outcomes": of["outcome"].value_counts().to_dict()}
        row |= {"mean": latency.mean()} | {f"p{p}": latency.quantile(p / 100) for p in PERCENTILES}
        rows.append(row)
    return {"policy": policy, "worlds": rows}


# Charts


class _Charts:
    """Makes figures into HTML, each with a name that is the same every time."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def html(self, figure: go.Figure, height: int, *, buttons: bool = True, **layout: Any) -> Markup:
        figure.update_layout(
            height=height,
            margin={"l": 8, "r": 12, "t": 8, "b": 8},
            template="plotly_white",
            font={"family": "system-ui, sans-serif", "size": 12, "color": "#333"},
            hoverlabel={"font": {"family": "system-ui, sans-serif"}},
            **layout,
        )
        figure.update_xaxes(automargin=True, title_standoff=6)
        figure.update_yaxes(automargin=True, title_standoff=6)
        # plotly writes <, > and / in its JSON as \\u003c and so on: a name cannot end the script.
        text = figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            div_id=f"chart-{next(self._numbers)}",
            default_height=f"{height}px",
            config={
                "responsive": True,
                "displaylogo": False,
                "displayModeBar": "hover" if buttons else False,
                "modeBarButtons": [["toImage", "resetScale2d"]],
                "toImageButtonOptions": {"format": "svg"},
            },
        )
        return Markup(text)


def _distribution(policy: str, worlds: Iterable[_World], charts: _Charts) -> Markup | None:
    """The share of requests answered within a time, in each world; None where nothing was answered."""
    figure = go.Figure()
    for world in worlds:
        requests = world.run.requests[world.run.requests["policy"] == policy]
        latency = np.sort(requests["latency_s"].dropna().to_numpy())
        if not len(latency):
            continue
        kept = _kept(len(latency))
        figure.add_scatter(
            x=1e3 * latency[kept],
            y=(kept + 1) / len(requests),
            name=world.name,
            mode="lines",
            line={"color": world.colour, "width": 2, "shape": "hv", "dash": _dash(world)},
            hovertemplate="%{y:.1%} within %{x:.4g} ms",
        )
    if not figure.data:
        return None
    figure.add_hline(y=0.95, line={"color": "#bbb", "width": 1, "dash": "dot"})
    figure.update_xaxes(title="latency, ms", rangemode="tozero")
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%", tickvals=[0, 0.25, 0.5, 0.75, 0.95])
    return charts.html(figure, 220, buttons=False, showlegend=False, hovermode="x")


def _course(policies: list[str], run: Run, charts: _Charts) -> Markup | None:
    """How a long run went: the 95th percentile of latency and the share in time, by time of arrival and policy."""
    requests = run.requests
    until_s = float(requests["arrival_s"].max())
    if len(requests) < _COURSE * len(policies) or not until_s > 0:
        return None
    bins = min(_COURSE, len(requests) // (20 * len(policies)))
    unit_s, unit = next((size, name) for size, name in _UNITS if until_s >= 2 * size or size == 1)
    middle = (np.arange(bins) + 0.5) * until_s / bins / unit_s
    figure = make_subplots(rows=3, shared_xaxes=True, vertical_spacing=0.05, row_heights=[0.5, 0.27, 0.23])
    which = np.minimum((requests["arrival_s"].to_numpy() * bins / until_s).astype(int), bins - 1)
    for policy, colour in zip(policies, _LINES * len(policies), strict=False):
        mine = (requests["policy"] == policy).to_numpy()
        of = requests.loc[mine, ["latency_s", "outcome"]].groupby(which[mine])
        p95, in_time = of["latency_s"].quantile(0.95), of["outcome"].agg(lambda o: (o == "completed").mean())
        line = {"color": colour, "width": 1.5}
        for row, y, said in ((1, 1e3 * p95, "%{y:.4g} ms"), (2, in_time, "%{y:.1%}")):
            figure.add_scatter(
                x=middle, y=y.reindex(range(bins)), name=escape(policy), mode="lines", line=line, row=row, col=1,
                legendgroup=policy, showlegend=row == 1, hovertemplate=said,
            )  # fmt: skip
    first = (requests["policy"] == policies[0]).to_numpy()
    rate = np.bincount(which[first], minlength=bins) * bins / until_s / requests["seed"].nunique()
    figure.add_scatter(
        x=middle, y=rate, row=3, col=1, showlegend=False, mode="lines", fill="tozeroy",
        line={"color": "#999", "width": 1}, hovertemplate="%{y:.3g} per second",
    )  # fmt: skip
    figure.update_yaxes(title="p95, ms", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title="in time", range=[0, 1.02], tickformat=".0%", row=2, col=1)
    figure.update_yaxes(title="requests/s", rangemode="tozero", row=3, col=1)
    figure.update_xaxes(title=f"time of arrival, {unit}", row=3, col=1)
    return charts.html(figure, 460, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}, hovermode="x")


def _kept(total: int) -> np.ndarray[Any, np.dtype[np.int_]]:
    """Which of so many sorted values to draw: evenly spread, and the last ones all."""
    even = np.linspace(0, total - 1, min(total, _POINTS)).astype(int)
    return np.union1d(even, np.arange(max(0, total - 50), total))


def _dash(world: _World) -> str:
    """Told apart without colour, too; the simulation lies under the dashes where both agree."""
    return "solid" if world.name == "simulated" else "dash"


def _where_time_went(policies: list[str], worlds: Sequence[_World], charts: _Charts) -> Markup | None:
    """Stacked bars of mean seconds by kind and place, the worlds of each policy under each other."""
    tables = {world.title: breakdown(world.run).reindex(policies) for world in worlds}
    table = pd.concat(tables, names=["world", "policy"]).swaplevel().fillna(0.0)
    bars = [(policy, world) for policy in policies for world in worlds]
    table = table.reindex([(policy, world.title) for policy, world in bars])
    if table.empty or not table.to_numpy().sum():
        return None
    small = table.max() < _SMALL * table.sum(axis=1).max()
    labels = [[escape(policy) for policy, _ in bars], [world.name for _, world in bars]]
    figure = go.Figure()
    for kind, hue in _HUES.items():
        here = [place for place in _places(worlds[0].run) if (kind, place) in table.columns[~small]]
        for place, shade in zip(here, sample_colorscale(list(hue), np.linspace(0, 1, len(here))), strict=True):
            _bar(figure, labels, table[kind, place], f"{kind} · {escape(place.replace('>', ' → '))}", shade)
    if small.any():
        rest = table.loc[:, small.to_numpy()].sum(axis=1)
        _bar(figure, labels, rest, f"other, each under {_SMALL:.1%}", _OTHER)
    means = [
        1e3 * world.run.requests.loc[world.run.requests["policy"] == policy, "latency_s"].mean()
        for policy, world in bars
    ]
    figure.add_scatter(
        x=means, y=labels, mode="markers", name="mean latency",
        marker={"symbol": "diamond", "size": 8, "color": "#222", "line": {"color": "#fff", "width": 1}},
        hovertemplate="mean latency %{x:.4g} ms",
    )  # fmt: skip
    figure.update_xaxes(title="mean per answered request, ms", rangemode="tozero")
    figure.update_yaxes(autorange="reversed")
    return charts.html(
        figure,
        150 + 30 * len(bars) + 12 * len(figure.data),
        barmode="stack",
        bargap=0.25,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "traceorder": "normal"},
    )


def _places(run: Run) -> list[str]:
    """Nodes and links by name, in the order of the testbed; groups as one."""
    return list(dict.fromkeys(group_of(run.testbed.spec).values()))


def _bar(figure: go.Figure, labels: list[list[str]], seconds: pd.Series, name: str, colour: str) -> None:
    figure.add_bar(
        x=1e3 * seconds.to_numpy(), y=labels, name=name, orientation="h",
        marker={"color": colour, "line": {"color": "#fff", "width": 0.5}}, hovertemplate="%{x:.4g} ms",
    )  # fmt: skip


def _rates(run: Run, charts: _Charts) -> Markup | None:
    """The rates of links that change, as long as requests come; None where all are constant.

    Those that are drawn are shown as the first seed drew them; of a group the first member's, of many links a few.
    """
    until_s = float(run.requests[["arrival_s", "end_s"]].max().max())
    seed = run.experiment.seeds[0]
    testbed = run.testbed.at_seed(seed)
    firsts = {way for link in testbed.spec.links for a, b in testbed.spec.pairs(link)[:1] for way in ((a, b), (b, a))}
    named = _changing({way: link for way, link in testbed.links.items() if way in firsts})  # of a group, one
    if not named:
        return None
    figure = go.Figure()
    for name, link in islice(named.items(), _RATES):
        end_s = _visible_s(link.rate, until_s)
        times, rates = sampled(link.rate, end_s)
        figure.add_scatter(
            x=[*times.tolist(), end_s], y=[*(rates * 8e-6).tolist(), rates[-1] * 8e-6], name=escape(name), mode="lines",
            line={"shape": "hv", "width": 1.5}, hovertemplate="%{y:.4g} Mbit/s at %{x:.4g} s",
        )  # fmt: skip
    figure.update_xaxes(title="time in the run, s")
    figure.update_yaxes(title="Mbit/s", rangemode="tozero")
    return charts.html(figure, 260, showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})


def _changing(links: Mapping[LinkId, Link]) -> dict[str, Link]:
    """Changing links by name; two directions that change alike are one."""
    found: dict[str, Link] = {}
    for (a, b), link in links.items():
        back = links.get((b, a))
        if link.rate.is_constant or f"{b} ⇄ {a}" in found:
            continue
        found[f"{a} ⇄ {b}" if back is not None and back.rate == link.rate else f"{a} → {b}"] = link
    return found


def _visible_s(rate: Rate, until_s: float) -> float:
    """Until when to draw a rate: a schedule that repeats is unrolled as far as it can be seen."""
    if rate.period_s is None:
        return until_s
    return min(until_s, rate.period_s * max(1, _TURNS // len(rate.starts_s)))


# Provenance


def _provenance(runs: Mapping[str, Run]) -> dict[str, Any]:
    """Facts by name with their value in each run; `same` where all agree."""
    flat = {}
    for title, run in runs.items():
        facts = {k: v for k, v in run.facts.items() if k != "experiment"}
        flat[title] = {"folder": str(run.folder)} | _flatten(facts)
    names = list(dict.fromkeys(name for facts in flat.values() for name in facts))
    rows = []
    for name in names:
        values = [facts.get(name) for facts in flat.values()]
        rows.append({"name": name, "values": values, "same": len(set(values)) == 1})
    return {"titles": list(runs), "rows": rows}


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested facts as one level of text. Empty ones say nothing and are left out."""
    found: dict[str, str] = {}
    for key, value in facts.items():
        name = f"{prefix} · {key}" if prefix else str(key).replace("_", " ")
        if isinstance(value, Mapping):
            found |= _flatten(value, name)
        elif isinstance(value, list | tuple):
            found |= {name: ", ".join(map(str, value))} if value else {}
        elif value not in (None, ""):
            found[name] = value[:16] if key == "sha256" else f"{value:g}" if isinstance(value, float) else str(value)
    return found


# Numbers for people


def _ms(seconds: float | None) -> str:
    """Seconds as milliseconds with three or more significant digits."""
    if seconds is None or not np.isfinite(seconds):
        return "–"
    value = 1e3 * seconds
    if abs(value) < 0.001:
        return "0" if value == 0 else "< 0.001"
    digits = next((d for d, least in ((0, 100), (1, 10), (2, 1)) if abs(value) >= least), 3)
    return f"{value:,.{digits}f}".replace(",", "\u202f")


def _percent(share: float | None, *, sign: bool = False) -> str:
    if share is None or not np.isfinite(share):
        return "–"
    value = round(100 * share, 1) + 0.0  # no −0
    return f"{value:{'+' if sign and value else ''}.{0 if abs(value) >= 100 else 1}f} %".replace("-", "−")
