"""Routes against all simple paths of small graphs, with links down and nodes that forward nothing."""

from __future__ import annotations

import pickle
from itertools import pairwise

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.workloads.errors import InputError
from isthmus.workloads.routing import NONE_DOWN, LinkId, Routes

NODES = "abcdef"
Links = dict[tuple[str, str], tuple[int, int]]  # in the order of the testbed: milliseconds there and back

pairs = st.permutations([(a, b) for a in NODES for b in NODES if a < b]).map(lambda all_: all_[:9])
milliseconds = st.integers(0, 2)  # few, so that many routes are equally good


@st.composite
def links(draw) -> Links:
    chosen = draw(pairs)[: draw(st.integers(1, 9))]
    return {(pair if draw(st.booleans()) else pair[::-1]): (draw(milliseconds), draw(milliseconds)) for pair in chosen}


def routes_of(links: Links, ends: frozenset[str] = frozenset()) -> Routes:
    there = {pair: ms * 1e-3 for pair, (ms, _) in links.items()}
    back = {(b, a): ms * 1e-3 for (a, b), (_, ms) in links.items()}
    return Routes(
        NODES, {way: s for pair in links for way, s in ((pair, there[pair]), (pair[::-1], back[pair[::-1]]))}, ends
    )


def both_ways(pairs: frozenset[tuple[str, str]]) -> frozenset[LinkId]:
    return pairs | {(b, a) for a, b in pairs}


Weight = tuple[int, int, int]


def brute_force(
    links: Links, start: str, end: str, down: frozenset[LinkId], ends: frozenset[str]
) -> dict[tuple[str, ...], Weight]:
    """Every way, with its latency there and back, its links, and the sum of their places in the testbed."""
    graph: nx.Graph[str] = nx.Graph()
    graph.add_nodes_from(NODES)
    places = {frozenset(pair): number for number, pair in enumerate(links)}
    latency = {frozenset(pair): sum(both) for pair, both in links.items()}
    graph.add_edges_from(pair for pair in links if pair not in down)
    ways = [(start,)] if start == end else map(tuple, nx.all_simple_paths(graph, start, end))
    found = {}
    for way in ways:
        if ends.isdisjoint(way[1:-1]):
            hops = [frozenset(hop) for hop in pairwise(way)]
            found[way] = sum(latency[h] for h in hops), len(hops), sum(places[h] for h in hops)
    return found


@settings(max_examples=150)
@given(links(), st.data())
def test_the_best_route_is_the_best_of_all_ways(links, data):
    ends = frozenset(data.draw(st.sets(st.sampled_from(NODES), max_size=2), label="ends"))
    down = both_ways(frozenset(data.draw(st.sets(st.sampled_from(sorted(links)), max_size=4), label="down")))
    routes = routes_of(links, ends)
    for start in NODES:
        for end in NODES:
            ways = brute_force(links, start, end, down, ends) or brute_force(links, start, end, NONE_DOWN, ends)
            assert routes.exist(start, end) == bool(ways)
            if not ways:
                with pytest.raises(InputError, match=f"no route from '{start}' to '{end}'"):
                    routes.find(start, end, down)
                continue
            found = routes.find(start, end, down)
            assert ways[found] == min(ways.values())
            assert routes.find(end, start, down) == found[::-1]
            assert ends.isdisjoint(found[1:-1])
            assert not (down & set(pairwise(found))) or not brute_force(links, start, end, down, ends)


@given(links(), st.data())
def test_with_the_same_links_down_every_piece_of_a_route_is_a_route(links, data):
    down = both_ways(frozenset(data.draw(st.sets(st.sampled_from(sorted(links)), max_size=3))))
    routes = routes_of(links)
    for start in NODES:
        for end in NODES:
            if not brute_force(links, start, end, down, frozenset()):
                continue
            route = routes.find(start, end, down)
            for i in range(len(route)):
                for j in range(i + 1, len(route)):
                    assert routes.find(route[i], route[j], down) == route[i : j + 1]


@pytest.mark.parametrize(
    ("order", "route"),
    [
        (["ab", "bd", "ac", "cd"], "abd"),
        (["ac", "cd", "ab", "bd"], "acd"),
        (["ab", "ac", "cd", "bd"], None),  # places 0 + 3 and 1 + 2: either, and the same one there and back
        (["ab", "ac", "bd", "cd"], "abd"),
    ],
)
def test_ways_of_the_same_latency(order, route):
    routes = routes_of(dict.fromkeys(map(tuple, order), (1, 1)))
    found = routes.find("a", "d")
    assert found == tuple(route) if route else found in (tuple("abd"), tuple("acd"))
    assert routes.find("d", "a") == found[::-1]


def test_a_shorter_way_of_the_same_latency_is_better_and_a_faster_longer_way_is_best():
    assert routes_of({("a", "b"): (1, 1), ("b", "c"): (1, 1), ("a", "c"): (2, 2)}).find("a", "c") == ("a", "c")
    assert routes_of({("a", "b"): (1, 1), ("b", "c"): (0, 1), ("a", "c"): (2, 2)}).find("a", "c") == ("a", "b", "c")


def test_what_forwards_nothing_is_reached_and_never_passed_through():
    chain = {("a", "b"): (1, 1), ("b", "c"): (1, 1), ("c", "d"): (1, 1), ("d", "e"): (1, 1)}
    routes = routes_of(chain, frozenset("c"))
    assert routes.find("a", "c") == ("a", "b", "c")
    assert routes.find("c", "e") == ("c", "d", "e")
    assert [routes.exist("b", n) for n in "abcdef"] == [True, True, True, False, False, False]
    watch = routes_of({("a", "b"): (0, 0), ("b", "c"): (0, 0)}, frozenset("b"))  # a leaf on what forwards nothing
    assert watch.find("a", "b") == ("a", "b")
    assert not watch.exist("a", "c")


def test_a_testbed_says_that_only_that_is_reachable_which_has_a_route(synthetic):
    moves = {"service": {"mean": "1s"}, "mobility": {"kind": "waypoints", "points": [[0, 0, 0]]}}
    testbed = synthetic(
        {"watch": "1s", "phone": moves, "cell": "1s", "cloud": "1s"},
        [{"between": pair, "rate": 1} for pair in (["watch", "phone"], ["phone", "cell"], ["cell", "cloud"])],
    )
    assert testbed.reachable("watch") == ["phone"]
    assert testbed.reachable("phone") == ["watch", "cell", "cloud"]
    assert testbed.reachable("cloud") == ["phone", "cell"]


def test_routes_pickle():
    routes = routes_of({("a", "b"): (1, 2), ("b", "c"): (0, 1), ("a", "c"): (1, 1), ("c", "d"): (1, 1)}, frozenset("b"))
    small = pickle.dumps(routes)
    before = {(a, b): routes.find(a, b) for a in "abcd" for b in "abcd"}
    again = pickle.loads(pickle.dumps(routes))
    assert {key: again.find(*key) for key in before} == before
    assert pickle.dumps(routes) == small  # nothing that was worked out goes along


def test_routes_are_the_same_in_every_process(elsewhere):
    code = """
from itertools import product
from isthmus.workloads.routing import Routes
grid = [(x, y) for x, y in product(range(4), range(4))]
names = {at: "n%d%d" % at for at in grid}
pairs = [(at, to) for at in grid for to in ((at[0] + 1, at[1]), (at[0], at[1] + 1)) if to in names]
routes = Routes(names.values(), {(names[a], names[b]): 1e-3 for p in pairs for a, b in (p, p[::-1])}, frozenset())
print([routes.find(a, b) for a, b in product(names.values(), names.values())])
"""
    assert elsewhere(code, hash_seed=1) == elsewhere(code, hash_seed=2)


def test_twenty_thousand_leaves_leave_the_core_small():
    inner = [f"edge-{i}" for i in range(100)]
    leaves = [f"cam-{i}" for i in range(20_000)]
    links = [(leaf, inner[i % 100]) for i, leaf in enumerate(leaves)]
    links += [(a, b) for a, b in zip(inner, inner[1:] + inner[:1], strict=True)]
    latency = {way: 1e-3 for a, b in links for way in ((a, b), (b, a))}
    routes = Routes([*inner, *leaves], latency, frozenset())
    assert set(routes._core) == set(inner)
    for i in range(0, 20_000, 7):
        assert len(routes.find(leaves[i], leaves[-i - 1])) <= 53
        assert routes.exist(leaves[i], inner[0])
    assert routes._paths.cache_info().misses <= 100
    cells = {way: 1e-3 for edge in inner for way in (("car", edge), (edge, "car"))}
    assert set(Routes([*inner, *leaves, "car"], latency | cells, frozenset(["car"]))._core) == set(inner)
