"""Prints the network interface over which this machine reaches another: python launch/route.py ADDRESS"""

import socket
import sys
import time

import psutil

# A pod or a machine that is still starting has no name yet.
WAIT_FOR_NAME_S = 120.0


def interface_to(address: str) -> str:
    """The interface whose own address a packet to `address` would carry. Raises OSError when there is no way there."""
    family, target = _resolve(address)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # nothing is sent
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own for entry in addresses):
            return name
    raise OSError(f"no interface has the address {own}")


def _resolve(address: str) -> tuple[int, tuple]:
    deadline = time.monotonic() + WAIT_FOR_NAME_S
    while True:
        try:
            family, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
            return family, target
        except socket.gaierror:
            if time.monotonic() > deadline:
                raise
            time.sleep(2)


if __name__ == "__main__":
    try:
        print(interface_to(sys.argv[1]))
    except OSError as error:
        sys.exit(f"error: {sys.argv[1]} cannot be reached: {error}")
