"""The servers that share a store: each joins, shows that it lives, and leaves or is removed as dead."""

from __future__ import annotations

from hidream_grpc.jobs.store import queries
from hidream_grpc.jobs.store.base import StoreBase, uninterrupted
from hidream_grpc.jobs.store.changes import Change, ChangeKind
from hidream_grpc.jobs.store.records import ReplicaRecord


class ReplicaRegistry(StoreBase):
    """Calls about replicas, and what they have in common: the identity of the store and its clock."""

    @uninterrupted
    async def store_id(self) -> str:
        """Which store this is: the same for all replicas, another one for each database."""
        async with self._database.read() as connection:
            return str((await connection.execute(queries.store_id())).scalar_one())

    @uninterrupted
    async def join(self, replica_id: str, model: str, before: str | None = None) -> None:
        """Let a replica have jobs and callers, from now until it leaves, or is removed as dead.

        Args:
            replica_id: that no other replica had before.
            model: what others are told of its model.
            before: the id that it had, if it was removed as dead: its callers are still there.
        """
        async with self._database.write() as connection:
            # It may be there already, from a try whose answer was lost.
            await connection.execute(queries.remove_replica(replica_id))
            await connection.execute(queries.add_replica(replica_id, model))
            if before is not None:
                await connection.execute(queries.remove_replica(before))
                await connection.execute(queries.move_calls(before, replica_id))

    @uninterrupted
    async def beat(self, replica_id: str) -> tuple[ReplicaRecord, ...]:
        """Show that a replica lives.

        Returns:
            All replicas. Where this one is not among them it was removed as dead, with all its claims.
        """
        async with self._database.write() as connection:
            await connection.execute(queries.beat(replica_id))
            rows = (await connection.execute(queries.all_replicas())).all()
        return tuple(ReplicaRecord(*row) for row in rows)

    @uninterrupted
    async def replicas(self) -> tuple[ReplicaRecord, ...]:
        """All replicas that have not left, nor been removed as dead."""
        async with self._database.read() as connection:
            return tuple(ReplicaRecord(*row) for row in await connection.execute(queries.all_replicas()))

    @uninterrupted
    async def remove_replica(self, replica_id: str, heartbeat: int | None = None) -> bool:
        """Take a replica its jobs and callers; with a heartbeat only if that is still its newest.

        Returns:
            Whether it was removed.
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
