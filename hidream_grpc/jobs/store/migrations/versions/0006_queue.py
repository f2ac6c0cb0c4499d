"""Indexes that hold what is asked of the whole queue: a claim does not read the rows of all that wait."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Replace an index and add one; servers that do not know them go on beside those that do."""
    has_not_ended = sa.text("end_time IS NULL")
    was_taken = sa.text("claim_number > 0")
    op.drop_index("ix_jobs_not_ended", "jobs")
    op.create_index(
        "ix_jobs_not_ended",
        "jobs",
        [
            "priority",
            "caller",
            "acceptance_number",
            "state",
            "model_fingerprint",
            "replica_id",
            "job_id",
            "end_time",
        ],
        sqlite_where=has_not_ended,
        postgresql_where=has_not_ended,
    )
    op.create_index(
        "ix_jobs_taken",
        "jobs",
        ["model_fingerprint", "acceptance_number"],
        sqlite_where=was_taken,
        postgresql_where=was_taken,
    )
