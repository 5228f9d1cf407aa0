"""Which host an actor runs on, where that matters: beside the run folder.

The driver's node has the run folder. The buffer is always there, and the learner's ranks where they fit; their room is
taken before any other actor starts, and kept while they are replaced. Otherwise a waiting sampler could get it, and the
run would stand still. Samplers and rewards run wherever Ray has room.
"""

from typing import Any

import ray
from ray.util.placement_group import NODE_ID_LABEL_KEY, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from common.errors import UserError
from conf.schema import LearnerConfig

Options = dict[str, Any]  # of an actor, for `options(...)`
PATIENCE_S = 60.0


def beside_the_driver() -> Options:
    """For an actor that needs no room and works on the run folder."""
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(_here(), soft=False)}


def room_for_ranks(learner: LearnerConfig) -> Options:
    """Takes the room of the learner's ranks: on the driver's node if all fit there, else on as few nodes as Ray can,
    and the run folder has to lie on a file system that these share.

    Raises UserError if others have taken the driver's node.
    """
    needs = {unit: amount for unit, amount in (("CPU", learner.num_cpus), ("GPU", learner.num_gpus)) if amount}
    if not needs:
        return beside_the_driver()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == _here())
    fits = all(learner.count * amount <= node["Resources"].get(unit, 0.0) for unit, amount in needs.items())
    labels = [{NODE_ID_LABEL_KEY: _here()}] * learner.count if fits else None
    group = placement_group([needs] * learner.count, strategy="PACK", bundle_label_selector=labels)
    if fits and not group.wait(PATIENCE_S):
        raise UserError(
            f"the learner ({learner.count} x {needs}) found no room on this host within {PATIENCE_S:.0f} s, though it "
            "would fit: another run or job is on it; end that, or wait for it"
        )
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group)}


def node_lives(node_id: str) -> bool:
    """Whether the cluster still has this node."""
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())


def node_of(actor: Any) -> ray.ObjectRef[str]:
    """The id of the node that an actor runs on, known once it has started."""
    node: ray.ObjectRef[str] = actor.__ray_call__.remote(lambda _: _here())
    return node


def _here() -> str:
    return str(ray.get_runtime_context().get_node_id())
