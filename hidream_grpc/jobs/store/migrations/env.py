"""What Alembic runs for each migration; the connection comes from `migrate.py`."""

from __future__ import annotations

from alembic import context

from hidream_grpc.jobs.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
