"""Brings a database to the newest schema."""

from __future__ import annotations

from alembic.command import upgrade
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection

from hidream_grpc.errors import StoreVersionError


def is_migrated(connection: Connection) -> bool:
    """Whether the database has the newest schema already."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    return MigrationContext.configure(connection).get_current_revision() == head


def migrate(connection: Connection, name: str) -> None:
    """Run the migrations that are missing, in the transaction of the connection.

    Args:
        name: of the database, for the operator.

    Raises:
        StoreVersionError: a newer version of the service has migrated the database.
    """
    config = _config()
    config.attributes["connection"] = connection
    try:
        upgrade(config, "head")
    except CommandError as error:
        raise StoreVersionError(name) from error


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "hidream_grpc.jobs.store:migrations")
    return config
