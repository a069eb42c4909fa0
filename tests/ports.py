"""Ports of this host that nobody listens on, for what a test starts a moment later."""

from __future__ import annotations

import random
import socket

OWN = range(10_000, 20_000)
"""Below those that the system gives to whoever asks for any, which are lost again in a moment."""


def free_ports(count: int) -> list[int]:
    """So many, each another."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(OWN, len(OWN)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise AssertionError("no free port")


def free_port() -> int:
    return free_ports(1)[0]
