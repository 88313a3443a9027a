"""Which kind of simulated node a description needs. Knows all kinds; has no physics of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from isthmus.sim.battery import Battery
from isthmus.sim.clock import Callbacks, Clock
from isthmus.sim.node import FifoNode, Place, Refuse
from isthmus.sim.queue_node import QueueNode
from isthmus.sim.sharing_node import SharingNode
from isthmus.workloads.memory import Memory
from isthmus.workloads.nodes import Node
from isthmus.workloads.testbed import Testbed


def make_node(
    clock: Clock, testbed: Testbed, node: Node, computed: Callbacks, refuse: Refuse, empty: Callable[[], None]
) -> Place:
    """A simulated node. `computed` is called with each token that ends, `refuse` with each for which it has no room,
    `empty` when its battery is."""
    if not node.special:
        return FifoNode(clock, node, computed)
    battery = memory = None
    if node.battery_j is not None:
        battery = Battery(clock, node.battery_j, node.power.idle, node.power.busy, empty)
    if node.discipline == "ps":
        return SharingNode(clock, node, computed, refuse, battery)
    if node.memory_bytes is not None:
        memory = Memory(node.memory_bytes, partial(testbed.needs, node.name))
    return QueueNode(clock, node, computed, refuse, partial(testbed.batch_factor, node.name), memory, battery)
