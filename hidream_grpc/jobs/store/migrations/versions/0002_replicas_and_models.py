"""Replicas that live by their heartbeat instead of leases, attached callers, models, and the store's id."""

from __future__ import annotations

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """From leases of each job."""
    # Servers of before cannot claim any more: without this column their statements fail.
    op.drop_column("jobs", "lease_end_time")
    op.add_column("jobs", sa.Column("model_fingerprint", sa.Text, nullable=False, server_default=""))
    op.execute("UPDATE jobs SET replica_id = NULL WHERE end_time IS NULL")
    op.create_table(
        "replicas",
        sa.Column("replica_id", sa.Text, nullable=False),
        sa.Column("heartbeat", sa.BigInteger, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("replica_id", name="pk_replicas"),
    )
    op.create_table(
        "attached_calls",
        sa.Column("call_id", sa.Text, nullable=False),
        sa.Column("job_number", _NUMBER, nullable=False),
        sa.Column("replica_id", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("call_id", name="pk_attached_calls"),
        sa.ForeignKeyConstraint(
            ["job_number"], ["jobs.number"], name="fk_attached_calls_job_number", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_attached_calls_job_number", "attached_calls", ["job_number"])
    op.create_index("ix_attached_calls_replica_id", "attached_calls", ["replica_id"])
    store_identity = op.create_table(
        "store_identity",
        sa.Column("store_id", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("store_id", name="pk_store_identity"),
    )
    op.bulk_insert(store_identity, [{"store_id": uuid.uuid4().hex}])
