"""An index of deadlines: without it all jobs that wait are read to find those that are late."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add an index; servers that do not know it go on beside those that do."""
    has_deadline = sa.text("end_time IS NULL AND deadline_time IS NOT NULL")
    op.create_index(
        "ix_jobs_deadline_time",
        "jobs",
        ["deadline_time"],
        sqlite_where=has_deadline,
        postgresql_where=has_deadline,
    )
