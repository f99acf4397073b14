"""Stops the run if the replicas' centers differ, for example after a memory error."""

from collections import Counter
from collections.abc import Callable

from shardes.distributed.store import no_poll
from shardes.distributed.world import World
from shardes.errors import RunError
from shardes.es.center import Center
from shardes.replicas.protocol import RunStore


def check_digest(what: str, digest: str, expected: str | None) -> None:
    """Compare a center that was rebuilt with the journal's digest, if it has one.

    Raises:
        RunError: they differ.
    """
    if expected not in (None, digest):
        raise RunError(
            f"{what} is rebuilt with digest {digest}, where the journal has {expected}; "
            "see shardes journal RUN_DIR verify"
        )


class ConsistencyCheck:
    """Compares the centers of the primary job's replicas before every `every`-th iteration (0:
    never).
    """

    def __init__(
        self,
        world: World,
        store: RunStore,
        center: Center,
        every: int,
        timeout: float,
        poll: Callable[[], None] = no_poll,
    ):
        self._world, self._store, self._center, self._poll = world, store, center, poll
        self._every, self._timeout = every, timeout
        self._compared: int | None = None  # the iteration of the comparison before

    def check(self, iteration: int, digest: str) -> None:
        """Every rank of every replica calls this with the digest of its replica's center.

        Raises:
            RunError: the centers differ; names replica, rank and tensor. Or a replica did not
                answer within the time limit.
        """
        if not self._every or iteration % self._every:
            return
        world, store = self._world, self._store.compare_centers(iteration)
        if world.is_leader:
            store.post_digest(world.replica, digest)
        digests = store.digests(world.replicas, self._timeout, self._poll)
        if len(set(digests)) == 1:
            self._delete_previous(iteration)
            return
        store.post_tensor_digests(world.job.rank, self._center.tensor_digests())
        by_rank = store.tensor_digests(world.job.size, self._timeout)
        (common, _), *_ = Counter(digests).most_common()
        reference = digests.index(common)
        differences = self._differences(digests, by_rank, reference)
        others = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise RunError(
            f"iteration {iteration}: the centers differ from that of replica {reference} in "
            f"{'; '.join(differences[:3])}{others}. Check the memory of that host; then start the "
            "same command again: it goes on from the journal"
        )

    def _delete_previous(self, iteration: int) -> None:
        """Delete the digests of the comparison before: every rank has read those, since its replica
        has posted the digest of a later center, which takes all of the replica's ranks.
        """
        if self._world.is_primary:
            if self._compared is not None:
                previous = self._store.compare_centers(self._compared)
                previous.delete_digests(self._world.replicas)
            self._compared = iteration

    def _differences(
        self, digests: list[str], by_rank: list[dict[str, str]], reference: int
    ) -> list[str]:
        """Each tensor of each rank that differs from the reference replica's."""
        ranks = self._world.job.size // self._world.replicas
        return [
            f"replica {replica}, rank {replica * ranks + rank}, {name}"
            for replica, digest in enumerate(digests)
            if digest != digests[reference]
            for rank in range(ranks)
            for name, value in by_rank[replica * ranks + rank].items()
            if value != by_rank[reference * ranks + rank][name]
        ]
