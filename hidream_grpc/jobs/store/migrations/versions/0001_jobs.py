"""Jobs, their labels, and the turns of their callers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """From an empty database."""
    _create_jobs()
    op.create_table(
        "job_labels",
        sa.Column("label_digest", sa.Text, nullable=False),
        sa.Column("job_number", _NUMBER, nullable=False),
        sa.PrimaryKeyConstraint("label_digest", "job_number", name="pk_job_labels"),
        sa.ForeignKeyConstraint(
            ["job_number"], ["jobs.number"], name="fk_job_labels_job_number", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_job_labels_job_number", "job_labels", ["job_number"])
    op.create_table(
        "turns",
        sa.Column("caller", sa.Text, nullable=False),
        sa.Column("last_turn", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("caller", name="pk_turns"),
    )
    op.create_index("ix_turns_last_turn", "turns", ["last_turn"])


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("number", _NUMBER, primary_key=True),
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("request_id", sa.Text, nullable=False),
        sa.Column("request_digest", sa.Text, nullable=False),
        sa.Column("caller", sa.Text, nullable=False),
        sa.Column("priority", sa.SmallInteger, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("create_time", sa.Double, nullable=False),
        sa.Column("end_time", sa.Double),
        sa.Column("deadline_time", sa.Double),
        sa.Column("cancel_reason", sa.Text),
        sa.Column("image_bytes", sa.BigInteger, nullable=False),
        sa.Column("claim_number", sa.BigInteger, nullable=False),
        sa.Column("replica_id", sa.Text),
        sa.Column("lease_end_time", sa.Double),
        sa.Column("submission", sa.Text, nullable=False),
        sa.Column("run", sa.Text, nullable=False),
        sa.UniqueConstraint("job_id", name="uq_jobs_job_id"),
        sqlite_autoincrement=True,
    )
    _create_partial_index(
        "ix_jobs_request_id", ["owner", "request_id"], "state NOT IN ('FAILED', 'CANCELLED')", unique=True
    )
    op.create_index("ix_jobs_owner_number", "jobs", ["owner", "number"])
    op.create_index("ix_jobs_caller", "jobs", ["caller"])
    _create_partial_index("ix_jobs_not_ended", ["priority", "number"], "end_time IS NULL")
    _create_partial_index("ix_jobs_end_time", ["end_time"], "end_time IS NOT NULL")


def _create_partial_index(name: str, columns: list[str], where: str, unique: bool = False) -> None:
    condition = sa.text(where)
    op.create_index(name, "jobs", columns, unique=unique, sqlite_where=condition, postgresql_where=condition)
