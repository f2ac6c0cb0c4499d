"""Gives a server the zygote that waits beside it; the interpreter of the server imports this at its start."""

from __future__ import annotations

import importlib
import os
import socket
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

# This folder is on the path, since Python has found this file.
handover = importlib.import_module("handover")


def _expect_zygote() -> None:
    descriptor, zygote_pid = map(int, os.environ.pop("WAITING_ZYGOTE").split())
    os.set_inheritable(descriptor, False)
    handover.hand_over_zygote(socket.socket(fileno=descriptor), zygote_pid)


def _run_hidden_one() -> None:
    """Leave the path, and do what the module of this name does that Python would have found instead."""
    folder, _, others = os.environ["PYTHONPATH"].partition(os.pathsep)
    os.environ["PYTHONPATH"] = others
    sys.path.remove(folder)
    if (spec := PathFinder.find_spec("sitecustomize")) is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


_expect_zygote()
_run_hidden_one()
