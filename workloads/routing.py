"""Best routes through a topology, also while some of its links are down. Knows names and latencies, nothing else.

Least latency there and back, then fewest links, then the links that are named first: whose places in the testbed have
the smallest sum. So there is one best route: the way back is the way there reversed, and a piece of a route is the
route of its ends.

Most nodes of a large testbed are leaves: they hang on one link, or forward nothing. A path has none in its middle, so
shortest paths are looked for among the few nodes that forward, once per node, and a leaf adds its own link.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache
from itertools import count
from typing import Any, cast

import networkx as nx

from isthmus.workloads.errors import InputError
from isthmus.workloads.random import Uniforms

LinkId = tuple[str, str]  # (from, to): one direction
NONE_DOWN: frozenset[LinkId] = frozenset()


class Routes:
    """`latency_s` of every direction of every link; `ends` are nodes that forward nothing, however many links."""

    def __init__(self, nodes: Iterable[str], latency_s: Mapping[LinkId, float], ends: frozenset[str]) -> None:
        self._weights: dict[str, dict[str, int]] = {node: {} for node in nodes}
        anything = Uniforms(0, "routes")
        for number, (a, b) in enumerate(dict.fromkeys(map(frozenset, latency_s))):
            # Integers, so that sums are exact: picoseconds, then links, then which links; no two routes weigh the same
            # (the lowest bits are there for different links whose numbers have the same sum: they are random, because
            # any formula has sums of its own that are the same).
            picoseconds = round(1e12 * (latency_s[a, b] + latency_s.get((b, a), 0.0)))
            which = number << 48 | int(anything[number] * 2**32)
            self._weights[a][b] = self._weights[b][a] = (picoseconds << 16 | 1) << 80 | which
        self._ends = ends
        self._paths = lru_cache(maxsize=1024)(self._paths_from)

    def find(self, start: str, end: str, down: frozenset[LinkId] = NONE_DOWN) -> tuple[str, ...]:
        """The nodes from start to end, both included; without the links that are `down`, unless there is no other way.

        `down` has both directions of each. InputError when there is no way at all.
        """
        if start == end:
            return (start,)
        found = self._find(start, end, down) or (self._find(start, end, NONE_DOWN) if down else None)
        if found is None:
            raise InputError(f"there is no route from {start!r} to {end!r}")
        return found

    def _find(self, start: str, end: str, down: frozenset[LinkId]) -> tuple[str, ...] | None:
        inside = frozenset(link for link in down if link[0] in self._core and link[1] in self._core)
        best: tuple[int, tuple[str, ...]] | None = None
        direct = self._weights[start].get(end)
        if direct is not None and (start, end) not in down:
            best = direct, (start, end)
        leave = self._doors(end, down)
        for first, there in self._doors(start, down):
            lengths, paths = self._paths(first, inside)
            for last, back in leave:
                if last in lengths:
                    weight = there + lengths[last] + back
                    if best is None or weight < best[0]:
                        path = (() if first == start else (start,)) + paths[last] + (() if last == end else (end,))
                        best = weight, path
        return None if best is None else best[1]

    def _doors(self, node: str, down: frozenset[LinkId]) -> list[tuple[str, int]]:
        """Forwarding nodes through which all else is reached, and how far they are: itself, if it is one."""
        if node in self._core:
            return [(node, 0)]
        return [(n, w) for n, w in self._weights[node].items() if n in self._core and (node, n) not in down]

    @cached_property
    def _core(self) -> nx.Graph[str]:
        """The nodes that forward, and the links between them."""
        # A dictionary, because it keeps its order: the order of a set of names is another in every process.
        inner = dict.fromkeys(
            node for node, links in self._weights.items() if len(links) > 1 and node not in self._ends
        )
        core: nx.Graph[str] = nx.Graph()
        core.add_nodes_from(inner)
        core.add_edges_from(
            (a, b, {"weight": weight}) for a in inner for b, weight in self._weights[a].items() if b in inner
        )
        return core

    def _paths_from(self, root: str, down: frozenset[LinkId]) -> tuple[dict[str, int], dict[str, tuple[str, ...]]]:
        core = self._core
        if down:
            core = core.copy()
            core.remove_edges_from(down)
        lengths, paths = cast(Any, nx.single_source_dijkstra(core, root))
        return lengths, {node: tuple(path) for node, path in paths.items()}

    def exist(self, start: str, end: str) -> bool:
        """Whether there is any route, all links being up."""
        return start == end or not self.regions[start].isdisjoint(self.regions[end])

    @cached_property
    def regions(self) -> Mapping[str, frozenset[int]]:
        """What each node is in: there is a route between two nodes when they have a region in common.

        A region is a connected piece of the core with all that hangs on it, or a link between two that forward nothing.
        """
        pieces = list(nx.connected_components(self._core))
        of = {node: number for number, piece in enumerate(pieces) for node in piece}
        numbers = count(len(pieces))
        regions: dict[str, set[int]] = {node: {of[node]} if node in of else set() for node in self._weights}
        for node, links in self._weights.items():
            if node not in of:
                for other in links:
                    if other in of:
                        regions[node].add(of[other])
                    elif node < other:
                        number = next(numbers)
                        regions[node].add(number)
                        regions[other].add(number)
        known: dict[frozenset[int], frozenset[int]] = {}  # one for all who are in the same
        return {node: known.setdefault(found, found) for node, found in ((n, frozenset(r)) for n, r in regions.items())}

    def __getstate__(self) -> dict[str, object]:
        # Paths are found again where they are needed; the cache does not pickle.
        return {"_weights": self._weights, "_ends": self._ends}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._paths = lru_cache(maxsize=1024)(self._paths_from)
