"""The version of this service, as it is installed."""

from __future__ import annotations

import importlib.metadata

SERVER_VERSION = importlib.metadata.version("hidream-grpc")
