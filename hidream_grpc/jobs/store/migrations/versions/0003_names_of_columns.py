"""Columns of jobs named for what they hold, instead of `number` and `run`."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Rename two columns, and take the jobs of servers that know the old names."""
    # Servers of the former version cannot write jobs any more: without these columns their statements fail.
    op.execute("ALTER TABLE jobs RENAME COLUMN number TO acceptance_number")
    op.execute("ALTER TABLE jobs RENAME COLUMN run TO progress_document")
    # They find out with their next heartbeat; their callers stay where they are.
    op.execute("DELETE FROM replicas")
