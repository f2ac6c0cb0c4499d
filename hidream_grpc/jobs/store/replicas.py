"""Registers the servers that share a store: each joins, shows that it lives, and leaves or is removed."""

from __future__ import annotations

from hidream_grpc.jobs.store import queries
from hidream_grpc.jobs.store.base import StoreBase, uninterrupted
from hidream_grpc.jobs.store.changes import Change, ChangeKind
from hidream_grpc.jobs.store.records import ReplicaRecord


class ReplicaRegistry(StoreBase):
    """Calls about replicas, and about what they share: the identity of the store and its clock."""

    @uninterrupted
    async def store_id(self) -> str:
        """The id of this store: the same for all replicas, another one for each database."""
        async with self._database.read() as connection:
            return str((await connection.execute(queries.store_id())).scalar_one())

    @uninterrupted
    async def join(self, replica_id: str, model: str, before: str | None = None) -> None:
        """Register a replica, which may have jobs and callers until it leaves or is removed as dead.

        Args:
            replica_id: an id that no other replica had before.
            model: its description of its model, for others.
            before: the id that it had, if it was removed as dead: its callers still wait.
        """
        async with self._database.write() as connection:
            # It may be registered already, by a try whose answer was lost.
            await connection.execute(queries.remove_replica(replica_id))
            await connection.execute(queries.add_replica(replica_id, model))
            if before is not None:
                await connection.execute(queries.remove_replica(before))
                await connection.execute(queries.move_calls(before, replica_id))

    @uninterrupted
    async def beat(self, replica_id: str) -> tuple[ReplicaRecord, ...]:
        """Raise a replica's heartbeat.

        Returns:
            All replicas. Where this one is not among them it was removed as dead, with all its claims.
        """
        async with self._database.write() as connection:
            await connection.execute(queries.beat(replica_id))
            rows = (await connection.execute(queries.all_replicas())).all()
        return tuple(ReplicaRecord(*row) for row in rows)

    @uninterrupted
    async def replicas(self) -> tuple[ReplicaRecord, ...]:
        """Read all replicas that have not left and were not removed as dead."""
        async with self._database.read() as connection:
            return tuple(ReplicaRecord(*row) for row in await connection.execute(queries.all_replicas()))

    @uninterrupted
    async def remove_replica(self, replica_id: str, heartbeat: int | None = None) -> bool:
        """Remove a replica, and with it its claims; with a heartbeat only if that is still its newest.

        Returns:
            Whether the replica was removed.
        """
        change = Change(ChangeKind.ANYTHING)
        async with self._database.write() as connection:
            removal = queries.remove_replica(replica_id, heartbeat)
            if not (await connection.execute(removal)).rowcount:
                return False
            await self._notify(connection, [change])
        self._committed([change])
        return True

    @uninterrupted
    async def follow_clock(self) -> None:
        """Have the clock follow the database's, where replicas share one."""
        if self._database.is_sqlite:
            return
        async with self._database.read() as connection:
            asked_at = self.clock.elapsed_seconds()
            epoch_seconds = (await connection.execute(queries.database_time())).scalar_one()
            self.clock.follow(epoch_seconds, asked_at)
