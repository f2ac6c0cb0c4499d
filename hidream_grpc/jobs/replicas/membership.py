"""Registers this server with the store that replicas share, and finds out which replicas are dead.

A live replica raises its heartbeat in the store. A replica whose heartbeat stands still for a whole lease,
by the time that the observer was awake itself, is removed; any other may then claim its jobs. The only
clock that counts is each observer's own, which never steps.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from hidream_grpc.errors import ModelNotServedError
from hidream_grpc.jobs.job import ModelIdentity
from hidream_grpc.jobs.limits import RequestDefaults, RequestLimits
from hidream_grpc.jobs.store.clock import boot_seconds
from hidream_grpc.jobs.store.records import ReplicaRecord
from hidream_grpc.jobs.store.store import SqlJobStore

logger = logging.getLogger(__name__)

BEATS_PER_LEASE = 3
WAKE_LOOK_SECONDS = 0.5
"""How soon a heartbeat that is due is sent after a sleep of the machine, in which timers stand still."""


class SilenceObserver:
    """Measures how long the heartbeats of others stand still. Pure, but for what it remembers.

    Args:
        lease_seconds: after so long a replica is dead.
        max_gap_seconds: the longest time between two looks that counts; a longer one is the observer's pause.
    """

    def __init__(self, lease_seconds: float, max_gap_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self._max_gap_seconds = max_gap_seconds
        self._heartbeats: dict[str, int] = {}
        self._silent_seconds: dict[str, float] = {}
        self._look_time: float | None = None

    def dead(self, records: Iterable[ReplicaRecord], now: float) -> list[ReplicaRecord]:
        """The replicas that are dead, by their heartbeats as they are now; `now` never goes back."""
        gap_seconds = 0.0 if self._look_time is None else now - self._look_time
        self._look_time = now
        records = tuple(records)
        silent_seconds = {}
        for record in records:
            stands_still = self._heartbeats.get(record.replica_id) == record.heartbeat
            before = self._silent_seconds.get(record.replica_id, 0.0)
            gap = min(gap_seconds, self._max_gap_seconds)
            silent_seconds[record.replica_id] = before + gap if stands_still else 0.0
        self._silent_seconds = silent_seconds
        self._heartbeats = {record.replica_id: record.heartbeat for record in records}
        return [r for r in records if silent_seconds[r.replica_id] >= self._lease_seconds]


@dataclass(frozen=True, slots=True)
class LiveModel:
    """A model that a live replica serves, and what a request for it is checked against.

    Attributes:
        tokenizer_fingerprint: identifies the tokenizers that its prompts are counted with.
    """

    identity: ModelIdentity
    tokenizer_fingerprint: str
    scheduler: str
    shift: float
    limits: RequestLimits
    defaults: RequestDefaults


class Membership:
    """Registers this replica, and keeps it registered. Belongs to the event loop's thread.

    Attributes:
        replica_id: another one each time that this replica was removed as dead.

    Args:
        on_removed: called when others have removed this replica as dead: its claims are lost.
    """

    def __init__(
        self,
        store: SqlJobStore,
        model: LiveModel,
        lease_seconds: float,
        on_removed: Callable[[], None],
    ) -> None:
        self.replica_id = uuid.uuid4().hex
        self.own_model = model
        self._store = store
        self._on_removed = on_removed
        self._beat_seconds = lease_seconds / BEATS_PER_LEASE
        self._observer = SilenceObserver(lease_seconds, 1.5 * self._beat_seconds)
        self._models: tuple[LiveModel, ...] = (model,)
        self._num_sharing = 0
        self._has_joined = False
        # `leave` waits for a beat that may join again.
        self._joining = asyncio.Lock()
        self._has_left = False
        self._id_before: str | None = None
        self._next_beat_time = 0.0

    @property
    def live_models(self) -> tuple[LiveModel, ...]:
        """Models of all live replicas, this one's first, as of the last heartbeat."""
        return self._models

    @property
    def shares_queue(self) -> bool:
        """Whether another live replica may run the jobs of this one's model, as of the last heartbeat.

        One of another version, whose model cannot be read, may.
        """
        return self._num_sharing > 0

    async def model(self, name: str | None) -> LiveModel:
        """The model of a name; None is for this replica's own.

        Of several of one name, as while a new version of it is rolled out, this replica's own goes first.

        Raises:
            ModelNotServedError: no live replica serves it.
            StoreUnavailableError: it cannot be found out which do.
        """
        if name is None or name == self.own_model.identity.name:
            return self.own_model
        # A replica that has just joined is not in the list of the last heartbeat.
        self._note_models(await self._store.replicas())
        for model in self._models:
            if model.identity.name == name:
                return model
        raise ModelNotServedError(name, tuple(sorted({model.identity.name for model in self._models})))

    async def join(self) -> None:
        """Register this replica; raises StoreUnavailableError."""
        model = msgspec.json.encode(self.own_model).decode()
        await self._store.join(self.replica_id, model, self._id_before)
        self._has_joined = True
        self._id_before = None

    async def leave(self) -> None:
        """Give up what this replica still has, for good; raises StoreUnavailableError."""
        self._has_left = True
        async with self._joining:
            await self._store.remove_replica(self.replica_id)

    async def beat(self) -> None:
        """Show that this replica lives, and look at the others; raises StoreUnavailableError."""
        async with self._joining:
            if not self._has_left:
                await self._beat()
        self._next_beat_time = boot_seconds() + self._beat_seconds

    async def _beat(self) -> None:
        if not self._has_joined:
            await self.join()
        records = await self._store.beat(self.replica_id)
        if all(record.replica_id != self.replica_id for record in records):
            self._note_removal()
            await self.join()
            records = await self._store.beat(self.replica_id)
        await self._store.follow_clock()
        self._note_models(records)
        others = (record for record in records if record.replica_id != self.replica_id)
        for dead in self._observer.dead(others, boot_seconds()):
            if await self._store.remove_replica(dead.replica_id, dead.heartbeat):
                logger.warning("replica %s was silent for a lease: its jobs go on elsewhere", dead.replica_id)

    async def pause(self) -> None:
        """Wait until the next heartbeat is due, also over a sleep of the machine."""
        while (left_seconds := self._next_beat_time - boot_seconds()) > 0:  # noqa: ASYNC110  (timers sleep too)
            await asyncio.sleep(min(left_seconds, WAKE_LOOK_SECONDS))

    def _note_removal(self) -> None:
        logger.warning("this replica was taken for dead: its jobs go on elsewhere")
        self._id_before, self.replica_id = self.replica_id, uuid.uuid4().hex
        self._has_joined = False
        self._on_removed()

    def _note_models(self, records: Iterable[ReplicaRecord]) -> None:
        models = {self.own_model.identity: self.own_model}
        num_sharing = 0
        for record in records:
            is_other = record.replica_id != self.replica_id
            try:
                model = _decoder.decode(record.model)
            except msgspec.MsgspecError as error:
                logger.debug("a replica of another version: %s", error)
                num_sharing += is_other
            else:
                models.setdefault(model.identity, model)
                is_same = model.identity.fingerprint == self.own_model.identity.fingerprint
                num_sharing += is_other and is_same
        self._models, self._num_sharing = tuple(models.values()), num_sharing


_decoder = msgspec.json.Decoder(LiveModel)
