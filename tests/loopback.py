"""Keeps the packets of a test on this machine, also where a fault of the code would send them elsewhere."""

import ipaddress
import socket


class LeavesThisMachine(AssertionError):
    """The code tried to reach another machine. Nothing was sent."""


def refuse_others(monkeypatch) -> list:
    """Lets the sockets of this process reach loopback only; returns a list of the addresses that were refused."""
    refused = []

    def guard(name):
        real = getattr(socket.socket, name)

        def guarded(self, *arguments):
            address = arguments[-1]
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
                refused.append(address)
                raise LeavesThisMachine(f"{name} to {address}")
            return real(self, *arguments)

        monkeypatch.setattr(socket.socket, name, guarded)

    for name in ("connect", "connect_ex", "sendto"):
        guard(name)
    return refused


def _is_loopback(host: str) -> bool:
    if host in ("localhost", ""):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a name would be looked up
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
