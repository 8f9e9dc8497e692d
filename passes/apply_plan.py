"""Carry out a plan: the one sequence of passes from a joint graph to its two halves."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from compact_fx.errors import failures_of
from compact_fx.passes.expand_projections import expand_projections
from compact_fx.passes.joint_graph import JointGraph
from compact_fx.passes.partition import Partition, partition
from compact_fx.passes.rewrite_weight_grads import rewrite_weight_grads
from compact_fx.passes.store_low_bit import store_low_bit
from compact_fx.plan import Plan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rewritten:
    """A joint graph with the sketches of a plan in it.

    Attributes:
        joint: with the plan's inputs.
        sketches: for each sketch the nodes that read its activation.
    """

    joint: JointGraph
    sketches: dict[int, tuple[fx.Node, ...]]


def rewrite(joint: JointGraph, plan: Plan) -> Rewritten:
    """The first half of `apply_plan`: sketches, and inputs on a copy where they are missing."""
    if not joint.added:
        with observed("with_inputs", joint.module):
            joint = joint.with_inputs(plan)
    with observed("rewrite_weight_grads", joint.module):
        return Rewritten(joint, rewrite_weight_grads(joint, plan))


def cut(rewritten: Rewritten, plan: Plan) -> Partition:
    """The second half of `apply_plan`; takes over the graph."""
    early = {
        node: None
        for site in plan.sketched
        if site.placement == "early" and site.sketch is not None
        for node in rewritten.sketches[site.sketch]
    }
    with observed("partition", rewritten.joint.module):
        halves = partition(rewritten.joint, recompute=plan.recompute, early=tuple(early))
    if plan.saved is None:
        return halves
    with observed("store_low_bit", halves.forward):
        return store_low_bit(halves, plan.saved, plan.saved_share)


def apply_plan(joint: JointGraph, plan: Plan) -> Partition:
    """Put a plan's sketches into a joint graph and cut it in two.

    ::

        joint ─► with_inputs ─► rewrite_weight_grads ─► partition ─► store_low_bit

    Projections are still one node each, as people read them; `expand` makes them operators.

    Args:
        joint: taken over where it has the plan's inputs, copied where it has none.
        plan: decides everything.

    Raises:
        CannotCompact: the graph is not the one that was planned for.
    """
    return cut(rewrite(joint, plan), plan)


def expand(halves: Partition) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Forward and backward, with each projection as operators that Inductor fuses."""
    for module in (halves.forward, halves.backward):
        with observed("expand_projections", module):
            expand_projections(module)
    return halves.forward, halves.backward


@contextlib.contextmanager
def observed(name: str, module: fx.GraphModule) -> Iterator[None]:
    """Around each pass: what fails has its name, what took how long is in the log."""
    start, before = time.perf_counter(), len(module.graph.nodes)
    with failures_of(name):
        yield
    milliseconds = 1e3 * (time.perf_counter() - start)
    log.debug("%s: %.0f ms, of %d nodes", name, milliseconds, before)
