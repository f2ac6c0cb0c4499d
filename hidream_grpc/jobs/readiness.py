"""Whether this server takes requests, from what is known of its engine, its stores and its end."""

from __future__ import annotations

from collections.abc import Callable

from hidream_grpc.engine.requests import EngineState
from hidream_grpc.errors import ArtifactUnavailableError, NotServingError, RequestError
from hidream_grpc.jobs.artifacts.artifacts import RETRY_AFTER_SECONDS, ArtifactStore
from hidream_grpc.jobs.artifacts.probe import ArtifactProbe
from hidream_grpc.jobs.store.probe import StoreProbe
from hidream_grpc.jobs.store.store import SqlJobStore

START_RETRY_SECONDS = 2.0


class Readiness:
    """Notes what may keep this server from taking requests.

    Args:
        replica_id: gives the id of this replica as it is registered now.
        max_outage_seconds: a store may refuse everything for so long before this server is not ready.
        observe: called with `is_ready` when it may have changed.

    Attributes:
        store_probe: of the job store; its `run` must run meanwhile.
        artifact_probe: of the artifact store; its `run` must run meanwhile.
        engine_state: whether the rank group can work.
        is_draining: whether nothing more is accepted.
    """

    def __init__(
        self,
        store: SqlJobStore,
        artifacts: ArtifactStore,
        replica_id: Callable[[], str],
        max_outage_seconds: float,
        observe: Callable[[bool], None],
    ) -> None:
        self.store_probe = StoreProbe(store, replica_id, max_outage_seconds, self._report)
        self.artifact_probe = ArtifactProbe(artifacts, max_outage_seconds, self._report)
        self.engine_state = EngineState.STARTING
        self.is_draining = False
        self._observe = observe

    @property
    def takes_requests(self) -> bool:
        """Whether a request is accepted where the queue has room for it."""
        return self.engine_state.takes_requests and not self.is_draining

    @property
    def is_ready(self) -> bool:
        """Whether callers are better sent here than elsewhere; one that comes all the same is tried."""
        return self.takes_requests and self.store_probe.is_usable and self.artifact_probe.is_usable

    @property
    def refusal(self) -> RequestError | None:
        """Why nothing can become a new job, though a retry still finds its own; None where it can."""
        failure = self.artifact_probe.failure
        return None if failure is None else ArtifactUnavailableError(RETRY_AFTER_SECONDS, failure)

    @property
    def may_claim(self) -> bool:
        """Whether jobs that wait may be claimed for the engine."""
        return self.engine_state is EngineState.SERVING and not self.is_draining

    def set_engine_state(self, state: EngineState) -> None:
        """Note whether the rank group can work."""
        self.engine_state = state
        self._report()

    def check(self) -> None:
        """Raise NotServingError, with why and when to try again, unless requests are taken."""
        if self.is_draining:
            raise shutting_down()
        if self.engine_state is EngineState.STARTING:
            raise NotServingError("the model is loading", START_RETRY_SECONDS)
        if not self.takes_requests:
            raise NotServingError("the devices are not available", START_RETRY_SECONDS)

    def _report(self) -> None:
        self._observe(self.is_ready)


def shutting_down() -> NotServingError:
    """The error of calls that the end of the server leaves without an answer."""
    return NotServingError("the server is shutting down", START_RETRY_SECONDS)
