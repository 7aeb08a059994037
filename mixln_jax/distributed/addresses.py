"""Addresses: where process 0 can be reached and where it listens."""

import concurrent.futures
import contextlib
import ipaddress
import os
import re
import socket
import threading
from collections.abc import Callable
from typing import TypeVar

from mixln_jax.system.errors import UsageError

Result = TypeVar('Result')

BIND = 'JAX_COORDINATOR_BIND_ADDRESS'


def listen_address(address: str) -> str:
    """Returns where process 0 listens, as host:port.

    It is JAX_COORDINATOR_BIND_ADDRESS, or else the one address that the host in `address` resolves to. It is [::], all
    interfaces, if the host resolves to no address of this machine (NAT, a container's port), to several, or to the
    loopback under a name of its own, as in Debian's /etc/hosts: others may know the host by another address.
    """
    host, port = split(address)
    if given := os.environ.get(BIND):
        if not re.fullmatch(r'.+:\d{1,5}', given):
            raise UsageError(f'{BIND}={given} is not host:port')
        return given
    candidates = sorted({str(info[4][0]) for info in resolve(host, port)})
    loopback = [one for one in candidates if ipaddress.ip_address(one).is_loopback]
    if (len(candidates) == 1 and not loopback) or (loopback and (host == 'localhost' or host in loopback)):
        with contextlib.suppress(OSError), listen(candidates[0], 0):  # fails unless it is an address of this machine
            return f'[{candidates[0]}]:{port}' if ':' in candidates[0] else f'{candidates[0]}:{port}'
    return f'[::]:{port}'


def split(address: str) -> tuple[str, int]:
    """Returns host and port of an address such as node03:1234 or [::1]:1234."""
    host, _, port = address.rpartition(':')
    return host.strip('[]'), int(port)


def resolve(host: str, port: int, timeout: float = 10.0) -> list[tuple]:
    """Returns what socket.getaddrinfo does, or nothing if it fails or takes longer than `timeout` seconds."""
    try:
        return in_thread(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), timeout)
    except (OSError, UnicodeError):  # OSError includes TimeoutError
        return []


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens at an address of this host; :: stands for all interfaces. Raises OSError."""
    if host == '::' and not socket.has_dualstack_ipv6():
        host = '0.0.0.0'
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=socket.SOMAXCONN, dualstack_ipv6=host == '::')


def in_thread(job: Callable[[], Result], timeout: float | None = None) -> Result:
    """Runs `job()` in another thread and returns or raises what it does. While the main thread runs C code, Python
    handles no signal. Raises TimeoutError after `timeout` seconds."""
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result(timeout)
