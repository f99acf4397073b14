"""Do the replicas still have the same center? Memory and arithmetic fail, rarely; then the run must not go on."""

import json
from collections import Counter

import torch.distributed as dist

from shardes.center import Center
from shardes.config import RunError
from shardes.world import World, await_keys


def check_replicas(world: World, center: Center, iteration: int, digest: str, timeout: float) -> None:
    """Compare the replicas' centers, of which this one has `digest`. Every rank of every replica calls this.

    Raises:
        RunError: they differ; names replica, rank and tensor. Or a replica did not answer within `timeout` seconds.
    """
    store = dist.PrefixStore(f"center {iteration}", world.store)
    if world.leads:
        store.set(f"replica {world.replica}", digest)
    replicas = [f"replica {replica}" for replica in range(world.replicas)]
    await_keys(store, replicas, timeout, f"iteration {iteration}: comparing centers")
    digests = [store.get(replica).decode() for replica in replicas]
    (common, _), *others = Counter(digests).most_common()
    if not others:
        return
    store.set(f"rank {world.job.rank}", json.dumps(center.tensor_digests()))
    await_keys(store, [f"rank {rank}" for rank in range(world.job.size)], timeout, f"iteration {iteration}: differing")
    per_replica = world.job.size // world.replicas
    right = digests.index(common)
    found = []
    for wrong in (replica for replica in range(world.replicas) if digests[replica] != common):
        for rank in range(per_replica):
            ours, theirs = (json.loads(store.get(f"rank {r * per_replica + rank}")) for r in (right, wrong))
            found += [
                f"replica {wrong}, rank {wrong * per_replica + rank}, {name}"
                for name in ours
                if ours[name] != theirs[name]
            ]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    raise RunError(
        f"iteration {iteration}: the centers differ from that of replica {right} in {'; '.join(found[:3])}{more}. "
        "Look at the memory of that host; then start the same command again: it goes on from the journal"
    )
