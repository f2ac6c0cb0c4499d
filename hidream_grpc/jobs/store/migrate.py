"""Brings a database to the newest schema."""

from __future__ import annotations

import re

from alembic.command import upgrade
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from hidream_grpc.errors import StoreUnusableError, StoreVersionError

_REVISION = r"\d{4}"
"""The form of the names of this service's migrations."""


def is_migrated(connection: Connection, name: str) -> bool:
    """Whether the database has the newest schema already.

    Args:
        connection: to the database.
        name: of the database, for the operator.

    Raises:
        StoreVersionError: a newer version of the service has migrated the database.
        StoreUnusableError: another program has.
    """
    script = ScriptDirectory.from_config(_config())
    head = script.get_current_head()
    assert head is not None, "the service has migrations"
    versions = MigrationContext.configure(connection).get_current_heads()
    if not {revision.revision for revision in script.walk_revisions()}.issuperset(versions):
        if len(versions) == 1 and re.fullmatch(_REVISION, versions[0]) and versions[0] > head:
            raise StoreVersionError(name)
        raise StoreUnusableError(
            f"{name}: its table alembic_version is another program's: {', '.join(map(repr, versions))}"
        )
    if len(versions) > 1:
        raise StoreUnusableError(f"{name}: its table alembic_version holds {len(versions)} versions")
    return versions == (head,)


def migrate(connection: Connection, name: str) -> None:
    """Run the migrations that are missing, in the transaction of the connection; raises as `is_migrated`."""
    # Another server may have done it meanwhile.
    if not is_migrated(connection, name):
        config = _config()
        config.attributes["connection"] = connection
        upgrade(config, "head")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "hidream_grpc.jobs.store:migrations")
    return config
