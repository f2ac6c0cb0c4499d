"""The span of each job, so that any server can go on with its trace."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add a column; servers that do not know it go on beside those that do."""
    op.add_column("jobs", sa.Column("trace", sa.Text))
