"""Planning where experts are, from measured traffic: one function for all strategies. Numpy and
scipy only.

    options = {"redundant_slots": 1, "topology": topology, "present": table}
    table = plan_placement("topology_aware", traffic_LRE, ranks=8, **options)

The same arguments always give the same table.
"""

from __future__ import annotations

import numpy as np

from moe_jax.errors import UserError
from moe_jax.placement.balanced import balanced
from moe_jax.placement.relabel import relabel
from moe_jax.placement.table import Placement, contiguous, count_slots, round_robin
from moe_jax.placement.topology import Topology, one_host
from moe_jax.placement.topology_aware import link_rows_by_part, topology_aware

STRATEGIES = ("contiguous", "round_robin", "balanced", "topology_aware")


def plan_placement(
    strategy: str,
    traffic_LRE: np.ndarray,
    *,
    ranks: int,
    redundant_slots: int,
    topology: Topology | None,
    present: Placement | None,
    groups: int = 1,
    tensor: int = 1,
) -> Placement:
    """The table of a strategy for `ranks` devices, each with `redundant_slots` slots more than its
    share of the experts.

    Args:
      traffic_LRE: how many choices the tokens of each source rank made of each expert. `balanced`
        uses only the sum over sources. `topology_aware` treats all sources as equal if there are
        not `ranks` of them. Both fill every slot.
      topology: without one, all devices are on one host.
      present: as many experts as possible stay where this table has them.
      groups: expert groups of the router; `balanced` keeps each on one host if they can be divided
        equally among the hosts.
      tensor: size of that mesh axis.

    Raises:
      UserError: the strategy is unknown, or the topology does not match the mesh.
    """
    layers, sources, num_experts = traffic_LRE.shape
    if strategy in ("contiguous", "round_robin"):
        return (contiguous if strategy == "contiguous" else round_robin)(
            layers, num_experts, ranks, redundant_slots
        )
    if strategy not in STRATEGIES:
        raise UserError(
            f"There is no placement strategy {strategy!r} to plan with: choose one of "
            f"{', '.join(STRATEGIES)}."
        )
    traffic_LRE = np.asarray(traffic_LRE, np.float64)
    if sources != ranks:
        traffic_LRE = np.repeat(traffic_LRE.sum(1, keepdims=True) / ranks, ranks, axis=1)
    host_R = one_host(ranks) if topology is None else topology.host_of_rank(ranks, tensor)
    hosts, weight = int(host_R[-1]) + 1, 1.0 if topology is None else topology.between_weight
    slots = count_slots(num_experts, ranks, redundant_slots) // ranks
    full = (
        present is not None
        and not present.empty_slots
        and present.by_rank.shape == (layers, ranks, slots)
    )
    present_LRS = present.by_rank if present is not None and full else None
    if strategy == "balanced":
        table_LRS = balanced(traffic_LRE.sum(1), ranks, slots, hosts, groups, present_LRS)
    else:
        table_LRS = topology_aware(traffic_LRE, slots, hosts, weight, present_LRS)
    new = Placement(table_LRS.reshape(layers, ranks * slots), num_experts, ranks)
    if present is None:
        return new
    if strategy == "balanced":
        return relabel(new, present, hosts, swap_hosts=True)
    return relabel(new, present, hosts, rows_LHDD=link_rows_by_part(table_LRS, traffic_LRE, hosts))
