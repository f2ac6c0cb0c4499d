"""An HTTP bridge to a hidream-grpc server."""

__version__ = "0.1.0"
