"""TCP ports of a server: a free one for 0, and a clear answer for a taken one."""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection

from twotower_engines.errors import ServingError


def choose_ports(host: str, wanted: dict[str, int], ours: Collection[str] = ()) -> dict[str, int]:
    """Return a usable port for each use, all different.

    Args:
        host: Address that the server will listen on.
        wanted: Option name, for example `--grpc-port`, to port; 0 for any free one.
        ours: Options at whose port a process of ours listens already.

    Raises:
        ServingError: A port is taken, may not be used, or is asked for twice.
    """
    held: dict[str, socket.socket] = {}
    try:
        # Named ports first, so that a free one is not chosen where a named one will be.
        for option, port in sorted(wanted.items(), key=lambda item: item[1] == 0):
            if option not in ours:
                held[option] = _bind(host, port, option, wanted)
        bound = {option: one.getsockname()[1] for option, one in held.items()}
        return {option: bound.get(option, port) for option, port in wanted.items()}
    finally:
        for one in held.values():
            one.close()


def hold_ports(host: str, ports: dict[str, int]) -> list[socket.socket]:
    """Keep other servers of ours from these ports until the sockets are closed.

    Between the look at a port and Triton's use of it, another `twotower serve` may look, and gRPC
    lets two servers share a port in silence. The kernel lets go of these names when we are gone.

    Args:
        host: As for `choose_ports`.
        ports: The result of `choose_ports`.

    Raises:
        ServingError: Another server of ours has just taken one of them.
    """
    held: list[socket.socket] = []
    for option, port in ports.items():
        held.append(socket.socket(socket.AF_UNIX))
        try:
            held[-1].bind(f"\0twotower-serve {host} {port}")  # an abstract name: no file
        except OSError as problem:
            for one in held:
                one.close()
            raise ServingError(
                f"port {port} is taken by another `twotower serve`; stop it, or give another with "
                f"{option} (0 chooses a free one)"
            ) from problem
    return held


def _bind(host: str, port: int, option: str, wanted: dict[str, int]) -> socket.socket:
    """Bind a port, without listening. gRPC itself would share a taken port in silence."""
    twins = [name for name, other in wanted.items() if other == port and name != option]
    if port and twins:
        raise ServingError(f"{option} and {twins[0]} are both {port}; give each its own port")
    if not 0 <= port < 65536:
        raise ServingError(f"{option} is {port}; a port is 0 (choose a free one) to 65535")
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as problem:
        raise ServingError(f"--host {host}: is no address of this machine ({problem})") from problem
    one = socket.socket(family, socket.SOCK_STREAM)
    # A port whose last connections are still closing is free; one that is listened on is not.
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        one.bind(address)
    except OSError as problem:
        one.close()
        if problem.errno == errno.EADDRINUSE:
            raise ServingError(
                f"port {port} is taken by another program; stop it, or give another with "
                f"{option} (0 chooses a free one)"
            ) from problem
        if problem.errno == errno.EADDRNOTAVAIL:
            raise ServingError(
                f"--host {host}: is no address of this machine ({problem.strerror}); give one of "
                "those that `hostname -I` lists, 127.0.0.1, or 0.0.0.0 for all"
            ) from problem
        raise ServingError(
            f"port {port} of {host} cannot be used ({problem.strerror}); give another with {option}"
        ) from problem
    return one
