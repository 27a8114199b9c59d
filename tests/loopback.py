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


def look_up_nothing(monkeypatch) -> None:
    """Only loopback and addresses in numbers are known; no server of names is asked for others."""
    real = socket.getaddrinfo

    def look_up(host, *arguments, **named):
        name = host.decode() if isinstance(host, bytes) else host
        if name and name not in ("localhost", socket.gethostname()):
            try:
                real(name, None, flags=socket.AI_NUMERICHOST)
            except socket.gaierror:
                raise socket.gaierror(
                    socket.EAI_NONAME, f"{name}: not looked up in tests"
                ) from None
        return real(host, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def _is_loopback(host: str) -> bool:
    if host in ("localhost", ""):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a name would be looked up
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
