"""The roll call: whether all processes of a run are there, and alike, before JAX's own start, which names nobody.

Process 0 listens, every other one comes to it on a connection of its own. HMACs over a nonce of either side prove who
speaks, so what somebody has heard on the wire is of no use to him. A line at a time:

    process 0  NONCE
    other      NUMBER COUNT NONCE PROOF PROOF      by the secret; by the secret and the digest
    process 0  PROOF welcome
    process 0  PROOF all are there                 or what is wrong

Whoever proves nothing is a stranger: turned away and counted, whatever he says and however long he takes.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import selectors
import socket
import sys
import threading
import time

from mixln_jax.system import console
from mixln_jax.system.errors import ProcessLost, UsageError

DIFFERENT, WELCOME, ALL = 'not alike:', 'welcome', 'all are there'
NONCE = re.compile(rb'[0-9a-f]{32}')
HELLO = re.compile(rb'([0-9]{1,6}) ([0-9]{1,6}) ([0-9a-f]{32}) ([0-9a-f]{64}) ([0-9a-f]{64})')
LIMIT = 4000  # bytes of a line
SOON = 5.0  # seconds in which a connection has to prove whose it is
PAUSE = 0.3  # seconds until another process tries again
AT_ONCE = 200  # connections that have not yet
LATE = 5.0  # seconds that another process grants process 0, which may have begun later, to say who is missing
BIND = 'JAX_COORDINATOR_BIND_ADDRESS'
NAMED = 20  # of the missing
UNSURE = 'anybody can say so where there is no processes.secret: waits for another until the time is over'
UNPROVEN = 'that did not prove to be of this run (strangers, or another processes.secret)'


def roll_call(
    address: str, count: int, number: int, timeout: float, digest: str, secret: str = ''
) -> dict[int, socket.socket]:
    """Returns in every process when all have come to process 0, at `address`.

    What is returned are the connections that stay: those of process 0 to all others, theirs to it.

    Args:
        timeout: seconds to wait for all.
        digest: of what has to be the same in every process; it is never sent.
        secret: what only the processes of this run know. Without one anybody can claim to be one of another
            configuration; such claims are believed when the time is over.

    Raises ProcessLost where some do not come within `timeout`, naming them; UsageError where one is different.
    """
    here, deadline = f'process {number} of {count}', time.monotonic() + timeout
    keys = _Keys.of(secret, digest)
    if number:
        problem, peers, strangers = _answer(address, number, count, deadline, keys)
    else:
        problem, peers, strangers = _call(address, count, deadline, keys)
    if problem.startswith(DIFFERENT):
        raise UsageError(f'{here}, process 0 at {address}: {problem}')
    if problem:
        also = f'; turned away {strangers} {UNPROVEN}' if strangers else ''
        raise ProcessLost(f'{here}, process 0 at {address}: {problem} (waited {timeout:g} s{also})')
    if strangers:
        console.say(f'mixln_jax: {here}: turned away {strangers} {UNPROVEN}', file=sys.stderr)
    for connection in peers.values():
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return peers


@dataclasses.dataclass(frozen=True)
class _Keys:
    ours: bytes  # of all who know the secret
    alike: bytes  # of those of the same configuration
    sure: bool  # whether there is a secret

    @classmethod
    def of(cls, secret, digest):
        ours = hashlib.sha256(f'mixln_jax roll call {secret}'.encode(errors='surrogatepass')).digest()
        return cls(ours, hmac.digest(ours, digest.encode(), 'sha256'), bool(secret))

    def proven(self, proofs, *words):
        """Whether the first of two proofs is by the secret, and the second by the digest too."""
        pairs = zip((self.ours, self.alike), proofs, strict=True)
        return [hmac.compare_digest(_proof(key, *words), proof) for key, proof in pairs]


def _proof(key, *words):
    return hmac.new(key, ' '.join(words).encode(), 'sha256').hexdigest()


def _signed(key, words, text):
    """A line of process 0, to the one that it has exchanged the nonces `words` with."""
    return f'{_proof(key, "process 0", *words, text)} {text}\n'.encode()


def where(address: str) -> str:
    """Where process 0 listens, as host:port: what JAX_COORDINATOR_BIND_ADDRESS says, else what the host of `address`
    stands for. All interfaces, [::], where that is nothing of this host (NAT, a container's port), more than one, or
    the loopback under a name of its own, as in Debian's /etc/hosts: there others may know the host by another address.
    """
    host, port = _split(address)
    if given := os.environ.get(BIND):
        if not re.fullmatch(r'.+:\d{1,5}', given):
            raise UsageError(f'{BIND}={given} is not host:port')
        return given
    found = sorted({info[4][0] for info in _resolved(host, port)})
    loopback = [one for one in found if ipaddress.ip_address(one).is_loopback]
    if (len(found) == 1 and not loopback) or (loopback and (host == 'localhost' or host in loopback)):
        with contextlib.suppress(OSError), _server(found[0], 0):  # is it this host's?
            return f'[{found[0]}]:{port}' if ':' in found[0] else f'{found[0]}:{port}'
    return f'[::]:{port}'


def _split(address):
    host, _, port = address.rpartition(':')
    return host.strip('[]'), int(port)


def _resolved(host, port, seconds=10.0):
    try:
        return aside(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), seconds)
    except (OSError, UnicodeError):  # also in time
        return []


def _server(host, port):
    if host == '::' and not socket.has_dualstack_ipv6():
        host = '0.0.0.0'
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=socket.SOMAXCONN, dualstack_ipv6=host == '::')


def aside(job, timeout=None):
    """What `job()` returns or raises, in another thread: Python answers no signal while its main thread is inside C.
    Raises TimeoutError where that takes longer than `timeout` seconds."""
    future = concurrent.futures.Future()

    def work():
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result(timeout)


def _call(address, count, deadline, keys):
    """Process 0: what is wrong, or '', the connections to the others, and how many strangers came."""
    host, port = _split(listening := where(address))
    if host == '::' and not os.environ.get(BIND):
        known = f'{_split(address)[0]} is not one address of this host, so process 0 listens on all of its interfaces'
        console.say(f'mixln_jax: {known} ({BIND}=host:port names one)', file=sys.stderr)
    try:
        server = _server(host, port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UsageError(f'port {port} of the coordinator cannot be used ({listening}: {reason})') from error
    with server, contextlib.closing(_Host(server, count, deadline, keys)) as host:
        host.call()
        came, host.came = ({}, host.came) if host.problem else (host.came, {})  # what is left to it is closed
        return host.problem, {number: visitor.connection for number, visitor in came.items()}, host.strangers


class _Visitor:
    """Who is on a connection to process 0."""

    def __init__(self, connection):
        connection.setblocking(False)
        self.connection, self.until, self.said = connection, time.monotonic() + SOON, b''
        self.nonce, self.words, self.key = secrets.token_hex(16), (), b''  # the last, once it has proven itself

    def tell(self, text):
        with contextlib.suppress(OSError):
            self.connection.sendall(_signed(self.key, self.words, text))

    def gone(self):
        """Whether it has hung up, or says more than it was asked."""
        try:
            self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True


class _Host:
    """Process 0, which listens to all at once: no stranger holds up anybody."""

    def __init__(self, server, count, deadline, keys):
        server.setblocking(False)
        self.problem, self.strangers, self.came = '', 0, {}
        self._server, self._count, self._deadline, self._keys = server, count, deadline, keys
        self._waiting, self._different, self._claims = [], [], {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(server, selectors.EVENT_READ)

    def close(self):
        for visitor in [*self._waiting, *self._different, *self.came.values()]:
            visitor.connection.close()
        self._selector.close()

    def call(self):
        """Returns when all have come, or the time is over, and has told all of ours what is wrong."""
        while len(self.came) + len(self._different) < self._count - 1:
            now = time.monotonic()
            if now >= self._deadline:
                self.problem = self.problem or self._missing()
                break
            for key, _ in self._selector.select(min(self._deadline - now, 0.5)):
                if key.fileobj is self._server:
                    self._accept()
                elif key.data in self._waiting:
                    self._read(key.data)
                elif key.data in self.came.values() and key.data.gone():
                    self._close(key.data)
            for visitor in [one for one in self._waiting if one.until < now]:
                self._turn_away(visitor)
        for visitor in self._waiting[:]:
            self._turn_away(visitor)
        for visitor in [*self.came.values(), *self._different]:
            visitor.tell(self.problem or ALL)

    def _accept(self):
        try:
            connection, _ = self._server.accept()
        except (BlockingIOError, ConnectionError):
            return  # it has left again
        except OSError:  # no more files can be open
            time.sleep(0.01)
            for visitor in self._waiting[:1]:
                self._turn_away(visitor)
            return
        if len(self._waiting) == AT_ONCE:
            self._turn_away(self._waiting[0])
        visitor = _Visitor(connection)
        self._waiting.append(visitor)
        self._selector.register(connection, selectors.EVENT_READ, visitor)
        with contextlib.suppress(OSError):
            connection.sendall(f'{visitor.nonce}\n'.encode())

    def _close(self, visitor):
        self._selector.unregister(visitor.connection)
        visitor.connection.close()
        self._waiting = [one for one in self._waiting if one is not visitor]
        self.came = {number: one for number, one in self.came.items() if one is not visitor}

    def _turn_away(self, visitor):
        self.strangers += 1
        self._close(visitor)

    def _read(self, visitor):
        try:
            piece = visitor.connection.recv(LIMIT)
        except BlockingIOError:
            return
        except OSError:
            piece = b''
        visitor.said += piece
        line, end, more = visitor.said.partition(b'\n')
        if end and not more:
            self._judge(visitor, HELLO.fullmatch(line))
        elif end or not piece or len(line) > LIMIT:
            self._turn_away(visitor)

    def _judge(self, visitor, hello):
        """What becomes of a visitor that has said a line."""
        if not hello:
            return self._turn_away(visitor)
        number, count, nonce, *proofs = (word.decode() for word in hello.groups())
        visitor.words = visitor.nonce, nonce, number, count
        ours, alike = self._keys.proven(proofs, 'hello', *visitor.words)
        number, same, sure = int(number), int(count) == self._count, alike or self._keys.sure
        if not ours or ((same or not sure) and not 0 < number < self._count):
            return self._turn_away(visitor)
        if visitor.gone():  # a process that was not answered at once, and comes again
            return self._close(visitor)
        self._waiting.remove(visitor)
        visitor.key = self._keys.alike if alike else self._keys.ours
        if not (alike and same):
            self._refuse(visitor, number, sure)
        elif number in self.came and not self.came[number].gone():
            self._differ(visitor, f'{DIFFERENT} two are number {number}')
        else:
            if number in self.came:
                self._close(self.came[number])
            self.came[number] = visitor
            visitor.tell(WELCOME)

    def _differ(self, visitor, problem):
        """Ends the roll call, soon: those that come a little later are to hear why."""
        self.problem = problem
        self._different.append(visitor)
        self._deadline = min(self._deadline, time.monotonic() + LATE)

    def _refuse(self, visitor, number, sure):
        """One of another configuration ends all where it is sure to be of this run; else it may be anybody's word."""
        problem = f'{DIFFERENT} process {number} has another count, configuration or versions than process 0'
        if sure:
            return self._differ(visitor, problem)
        if number not in self._claims:
            console.say(f'mixln_jax: process 0 of {self._count}: {problem}; {UNSURE}', file=sys.stderr)
        self._claims[number] = problem
        visitor.tell(problem)
        self._close(visitor)

    def _missing(self):
        missing = [number for number in range(1, self._count) if number not in self.came]
        named = ', '.join(map(str, missing[:NAMED])) + (f' and {len(missing) - NAMED} more' if missing[NAMED:] else '')
        claimed = (self._claims[number] for number in missing if number in self._claims)
        return next(claimed, f'missing: {named} of 0 to {self._count - 1}')


def _answer(address, number, count, deadline, keys):
    """Any other process: what is wrong, or '', the connection to process 0, and how many strangers answered."""
    (host, port), problem, strangers = _split(address), 'it did not answer', 0
    while (left := deadline - time.monotonic()) > 0:
        for *_, place in _resolved(host, port, left):  # all that the name stands for: a stranger may listen at one
            try:
                connection = _connected(place, deadline)
            except OSError:
                continue
            with contextlib.ExitStack() as closing:
                closing.callback(connection.close)
                try:
                    said, sure = _introduce(connection, number, count, deadline, keys)
                except ValueError:
                    strangers += 1
                    continue
                except OSError:
                    problem = 'it did not say that all are there'
                    continue
                if sure and said == ALL:
                    closing.pop_all()
                    return '', {0: connection}, strangers
                if sure:
                    return said, {}, strangers
                if problem != said:
                    console.say(f'mixln_jax: process {number} of {count}: {said}; {UNSURE}', file=sys.stderr)
                problem = said
        time.sleep(max(0, min(PAUSE, deadline - time.monotonic())))
    return problem, {}, strangers


def _connected(place, deadline):
    connection = socket.create_connection(place[:2], max(0.01, min(deadline - time.monotonic(), SOON)))
    with contextlib.ExitStack() as closing:
        closing.callback(connection.close)
        if connection.getsockname() == connection.getpeername():
            raise ConnectionError('TCP may connect a port that nobody listens at with itself')
        closing.pop_all()
        return connection


def _introduce(connection, number, count, deadline, keys):
    """(what process 0 has to say, whether it surely is process 0), once all have come or something is wrong.

    Raises ValueError for a stranger, OSError where process 0 has gone again or says nothing in time.
    """

    def hear(until):
        proof, _, text = _line(connection, until).decode('ascii').partition(' ')
        ours, alike = keys.proven((proof, proof), 'process 0', *words, text)
        if not alike and not (ours and text.startswith(DIFFERENT)):
            raise ValueError('no proof')
        return text, alike or keys.sure

    nonce, soon = secrets.token_hex(16), min(deadline, time.monotonic() + SOON)
    try:
        given = _line(connection, soon)
        if not NONCE.fullmatch(given):
            raise ValueError('no nonce')
        words = given.decode(), nonce, str(number), str(count)
        proofs = [_proof(key, 'hello', *words) for key in (keys.ours, keys.alike)]
        connection.sendall(' '.join([str(number), str(count), nonce, *proofs]).encode() + b'\n')
        said = hear(soon)
    except OSError as error:
        raise ValueError('silent, or gone') from error
    return hear(deadline + LATE) if said[0] == WELCOME else said


def _line(connection, deadline):
    """The next line, and not a byte more: what follows is for another reader. Raises OSError where none comes."""
    line = b''
    while not line.endswith(b'\n'):
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        byte = connection.recv(1)
        if not byte or len(line) == LIMIT:
            raise ConnectionError('no whole line')
        line += byte
    return line[:-1]
