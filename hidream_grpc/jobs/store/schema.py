"""The tables of the job store, the same in SQLite and PostgreSQL.

A column is what a query asks for; all else of a job stands in two JSON documents (`rows.py`): the
submission, which never changes, and the progress. JSON is kept as text: PostgreSQL's own JSON refuses a NUL
in a prompt.
"""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
    }
)

_HAS_ENDED = sa.text("end_time IS NOT NULL")
_HAS_NOT_ENDED = sa.text("end_time IS NULL")
_HAS_DEADLINE = sa.text("end_time IS NULL AND deadline_time IS NOT NULL")

# In queries in these very words: with values of their own databases do not use the indexes.
HOLDS_ITS_REQUEST_ID = sa.text("state NOT IN ('FAILED', 'CANCELLED')")
WAS_TAKEN = sa.text("claim_number > 0")

jobs = sa.Table(
    "jobs",
    metadata,
    # Never used twice, so that a page token stays valid.
    sa.Column("acceptance_number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
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
    # The replica that has the job, as long as it is in `replicas`; NULL where none has it.
    sa.Column("replica_id", sa.Text),
    sa.Column("submission", sa.Text, nullable=False),
    sa.Column("progress_document", sa.Text, nullable=False),
    # Empty in rows that are older than the column: any server may run those.
    sa.Column("model_fingerprint", sa.Text, nullable=False, server_default=""),
    # NULL in rows that are older than the column, and where nothing is traced.
    sa.Column("trace", sa.Text),
    sa.UniqueConstraint("job_id"),
    sa.Index(
        "ix_jobs_request_id",
        "owner",
        "request_id",
        unique=True,
        sqlite_where=HOLDS_ITS_REQUEST_ID,
        postgresql_where=HOLDS_ITS_REQUEST_ID,
    ),
    sa.Index("ix_jobs_owner_number", "owner", "acceptance_number"),
    sa.Index("ix_jobs_caller", "caller"),
    # All that is asked of the whole queue: its rows, which are long, are not read.
    sa.Index(
        "ix_jobs_not_ended",
        "priority",
        "caller",
        "acceptance_number",
        "state",
        "model_fingerprint",
        "replica_id",
        "job_id",
        # SQLite looks into the row for a column that the condition alone names.
        "end_time",
        sqlite_where=_HAS_NOT_ENDED,
        postgresql_where=_HAS_NOT_ENDED,
    ),
    sa.Index(
        "ix_jobs_taken",
        "model_fingerprint",
        "acceptance_number",
        sqlite_where=WAS_TAKEN,
        postgresql_where=WAS_TAKEN,
    ),
    sa.Index(
        "ix_jobs_deadline_time",
        "deadline_time",
        sqlite_where=_HAS_DEADLINE,
        postgresql_where=_HAS_DEADLINE,
    ),
    sa.Index("ix_jobs_end_time", "end_time", sqlite_where=_HAS_ENDED, postgresql_where=_HAS_ENDED),
    sqlite_autoincrement=True,
)

job_labels = sa.Table(
    "job_labels",
    metadata,
    # A digest of key and value (`rows.label_digest`): its length is the same for every label.
    sa.Column("label_digest", sa.Text, primary_key=True),
    sa.Column(
        "job_number",
        sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
        sa.ForeignKey(jobs.c.acceptance_number, ondelete="CASCADE"),
        primary_key=True,
    ),
    sa.Index("ix_job_labels_job_number", "job_number"),
)

turns = sa.Table(
    "turns",
    metadata,
    sa.Column("caller", sa.Text, primary_key=True),
    # Grows from turn to turn, over all callers.
    sa.Column("last_turn", sa.BigInteger, nullable=False),
    sa.Index("ix_turns_last_turn", "last_turn"),
)
"""When each caller last had a turn."""

replicas = sa.Table(
    "replicas",
    metadata,
    sa.Column("replica_id", sa.Text, primary_key=True),
    # Grows while the replica lives; when it stands still for too long, others remove the row.
    sa.Column("heartbeat", sa.BigInteger, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
)
"""The servers that run jobs of this store. A replica without a row has no jobs and no callers."""

attached_calls = sa.Table(
    "attached_calls",
    metadata,
    sa.Column("call_id", sa.Text, primary_key=True),
    sa.Column(
        "job_number",
        sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
        sa.ForeignKey(jobs.c.acceptance_number, ondelete="CASCADE"),
        nullable=False,
    ),
    sa.Column("replica_id", sa.Text, nullable=False),
    sa.Index("ix_attached_calls_job_number", "job_number"),
    sa.Index("ix_attached_calls_replica_id", "replica_id"),
)
"""Callers that wait for their job, each at a replica: the last one that leaves stops the job."""

identity = sa.Table("store_identity", metadata, sa.Column("store_id", sa.Text, primary_key=True))
"""One row: the id of this store. An artifact store belongs to one store of jobs."""
