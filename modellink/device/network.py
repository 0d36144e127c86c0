"""Network interfaces that the environment names for a communication library."""

import os
import socket
from collections.abc import Collection, Mapping

VARIABLES = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME", "hccl": "HCCL_SOCKET_IFNAME"}


def interface_problem(backend: str, environment: Mapping[str, str] = os.environ,
                      there: Collection[str] | None = None) -> str | None:
    """One sentence when the interface that is named for a backend is not there; None when all is well.

    gloo takes whole names and needs all of them. NCCL and HCCL take beginnings of names, whole names after `=`, and
    need one that fits; after `^` they take all but those named.

    Args:
        backend: gloo, nccl or hccl.
        environment: where to read the variable.
        there: names of this machine's interfaces (default: asked of the system).
    """
    variable = VARIABLES[backend]
    value = environment.get(variable, "")
    if not value or value.startswith("^"):
        return None
    names = {name for _, name in socket.if_nameindex()} if there is None else set(there)
    words = value.removeprefix("=").split(",")
    if backend == "gloo":
        missing = [word for word in value.split(",") if word not in names]
    elif value.startswith("="):
        missing = [] if names & set(words) else words
    else:
        missing = [] if any(name.startswith(word) for name in names for word in words) else words
    if not missing:
        return None
    return (f"{variable}={value}: this machine has no network interface {', '.join(missing)}; set it to one of "
            f"{', '.join(sorted(names))}, or unset it.")
