"""The roll call: who is missing, who is different, who is a stranger, and that a signal ends it."""

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import threading
import time

import jax
import pytest
import strangers
from strangers import free_port

from mixln_jax import config as configs
from mixln_jax import main, recipes
from mixln_jax.distributed import addresses, processes, rollcall
from mixln_jax.models import families
from mixln_jax.runs import environment, workdir
from mixln_jax.system import signals
from mixln_jax.system.errors import ProcessLost, Stopped, UsageError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(rollcall, 'SOON', 0.2)
    monkeypatch.setattr(rollcall, 'PAUSE', 0.02)
    monkeypatch.setattr(rollcall, 'LATE', 1.0)
    for name in (*processes.VARIABLES, processes.SECRET, addresses.BIND, 'SLURM_JOB_ID', 'OMPI_MCA_orte_hnp_uri'):
        monkeypatch.delenv(name, raising=False)


def call_roll(count, numbers, timeout=20.0, digests=None, secrets=None):
    """What the roll call of `numbers` gives in each: connections, or what it raises."""
    address = f'127.0.0.1:{free_port()}'

    def one(at):
        digest, secret = ((given or ['same'] * len(numbers))[at] for given in (digests, secrets or [''] * len(numbers)))
        try:
            return processes.roll_call(address, count, numbers[at], timeout, digest, secret)
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(numbers)) as pool:
        return list(pool.map(one, range(len(numbers))))


class TestRollCall:
    def test_all_are_there(self):
        peers = call_roll(4, [2, 0, 3, 1])
        assert [set(of) for of in peers] == [{0}, {1, 2, 3}, {0}, {0}]
        for connection in [c for of in peers for c in of.values()]:
            connection.close()

    def test_missing_ones_are_named_to_all(self):
        errors = call_roll(4, [0, 2], timeout=0.5)
        for error in errors:
            assert isinstance(error, ProcessLost)
            assert 'process 0 at 127.0.0.1:' in str(error) and 'missing: 1, 3 of 0 to 3' in str(error)

    def test_process_0_is_missing(self):
        [error] = call_roll(2, [1], timeout=0.5)
        assert isinstance(error, ProcessLost) and 'process 0 at 127.0.0.1:' in str(error)
        assert 'did not answer' in str(error)

    @pytest.mark.parametrize('secret', ['', 'hush'])
    def test_another_configuration(self, capsys, secret):
        """Said by whoever knows the secret it ends all at once; by anybody, when the time is over."""
        begun, timeout = time.monotonic(), 20 if secret else 0.6
        errors = call_roll(3, [0, 1, 2], timeout, ['same', 'same', 'other'], [secret] * 3)
        for error in errors:
            assert isinstance(error, UsageError) and 'process 2 has another count, configuration or' in str(error)
        assert (time.monotonic() - begun > 0.5) == (not secret) and time.monotonic() - begun < 10
        assert ('waiting for another answer until the timeout' in capsys.readouterr().err) == (not secret)

    def test_one_of_another_configuration_that_starts_again(self):
        """Without a secret its slot is free for one that is right."""
        address = f'127.0.0.1:{free_port()}'
        with concurrent.futures.ThreadPoolExecutor() as pool:
            zero = pool.submit(processes.roll_call, address, 2, 0, 10.0, 'same')
            assert isinstance(pool.submit(processes.roll_call, address, 2, 1, 0.2, 'other').exception(), UsageError)
            one = pool.submit(processes.roll_call, address, 2, 1, 10.0, 'same')
            assert [set(zero.result()), set(one.result())] == [{1}, {0}]

    def test_another_count(self):
        address = f'127.0.0.1:{free_port()}'
        with concurrent.futures.ThreadPoolExecutor() as pool:
            calls = [pool.submit(processes.roll_call, address, 2 + n, 3 * n, 10.0, 'same') for n in (0, 2)]
            for call in calls:
                assert 'process 6 has another count' in str(call.exception())

    def test_another_secret(self):
        errors = call_roll(2, [0, 1], 0.4, secrets=['hush', 'psst'])
        for error in errors:
            assert isinstance(error, ProcessLost) and 'strangers, or another processes.secret' in str(error)
            assert 'hush' not in str(error) and 'psst' not in str(error)

    def test_two_with_one_number(self):
        errors = call_roll(3, [0, 1, 1], timeout=5)
        assert all(isinstance(error, UsageError) and 'two are number 1' in str(error) for error in errors)

    def test_many_missing_ones(self):
        [error] = call_roll(1000, [0], timeout=0.1)
        assert 'missing: 1, 2, 3' in str(error) and 'and 979 more of 0 to 999' in str(error)

    def test_one_that_leaves_and_comes_again(self, monkeypatch):
        """Its slot is free meanwhile. It is given time to introduce itself and leaves `wait` seconds after that."""
        monkeypatch.setattr(rollcall, 'SOON', 5.0)
        address = f'127.0.0.1:{free_port()}'
        keys = rollcall._Keys.derive('', 'same')
        with concurrent.futures.ThreadPoolExecutor() as pool:
            zero = pool.submit(processes.roll_call, address, 3, 0, 10.0, 'same')
            for wait in (0.1, 0.0):
                with monkeypatch.context() as patch, strangers.until_there(int(address[10:])) as connection:
                    patch.setattr(rollcall, 'LATE', wait - 10.0)
                    with contextlib.suppress(OSError):
                        rollcall._introduce(connection, 1, 3, time.monotonic() + 10.0, keys)
            others = [pool.submit(processes.roll_call, address, 3, number, 10.0, 'same') for number in (1, 2)]
            assert [set(found.result()) for found in (zero, *others)] == [{1, 2}, {0}, {0}]

    def test_who_says_nothing_is_hung_up_on(self):
        """After SOON, while the roll call goes on."""
        port = free_port()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            zero = pool.submit(processes.roll_call, f'127.0.0.1:{port}', 2, 0, 20.0, 'same')
            with strangers.until_there(port) as connection:  # which waits 5 s
                while connection.recv(64):  # its nonce, then the end
                    pass
            assert not zero.done()
            one = pool.submit(processes.roll_call, f'127.0.0.1:{port}', 2, 1, 20.0, 'same')
            assert [set(zero.result()), set(one.result())] == [{1}, {0}]

    def test_a_port_in_use(self):
        with socket.create_server(('', 0)) as server, pytest.raises(UsageError, match='port .* cannot be used'):
            processes.roll_call(f'127.0.0.1:{server.getsockname()[1]}', 2, 0, 1.0, 'd')


class TestStrangers:
    @pytest.mark.parametrize('kind', [*strangers.VISITORS, *strangers.FAKES])
    def test_are_turned_away(self, capsys, monkeypatch, kind):
        if kind.startswith('200'):  # process 1 comes after all of them
            monkeypatch.setattr(rollcall, 'SOON', 2.0)
        begun = time.monotonic()
        found = strangers.met(kind)
        assert [set(peers) for peers in found] == [{1}, {0}] and time.monotonic() - begun < 10
        said = capsys.readouterr().err
        assert said.count('\n') == 1 and ('turned away' in said or 'waiting for another answer' in said)

    def test_more_than_wait_at_once(self, monkeypatch):
        monkeypatch.setattr(rollcall, 'AT_ONCE', 5)
        assert [set(peers) for peers in strangers.met('200 silent ones')] == [{1}, {0}]

    @pytest.mark.parametrize('kind', ['a byte now and then', 'lines without end', 'another digest'])
    def test_do_not_hold_up_the_end(self, kind):
        """Nor do they hide who is missing."""
        port, begun = free_port(), time.monotonic()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            zero = pool.submit(processes.roll_call, f'127.0.0.1:{port}', 3, 0, 0.5, 'digest', 'secret')
            for connection in strangers.VISITORS[kind](port):
                connection.close()
            error = zero.exception()
        assert time.monotonic() - begun < 10 and 'missing: 1, 2 of 0 to 2 (waited 0.5 s; turned away 1' in str(error)

    def test_one_in_the_place_of_process_0(self):
        port = free_port()
        fake = strangers.listens(strangers.NONCE, strangers.claim(f'{rollcall.DIFFERENT} you'), times=100)
        threading.Thread(target=fake, args=(port,), daemon=True).start()
        with pytest.raises(ProcessLost, match='it did not answer .*turned away'):
            processes.roll_call(f'127.0.0.1:{port}', 2, 1, 0.3, 'digest', 'secret')


class TestWhereProcess0Listens:
    @pytest.mark.parametrize(
        'host, found, expected',
        [
            ('127.0.0.1', ['127.0.0.1'], '127.0.0.1:99'),
            ('localhost', ['::1', '127.0.0.1'], '127.0.0.1:99'),
            ('node03', ['10.0.0.3'], '10.0.0.3:99'),
            ('[fd00::3]', ['fd00::3'], '[fd00::3]:99'),
            ('node03', ['127.0.1.1'], '[::]:99'),  # Debian's /etc/hosts: the others know it by another address
            ('node03', ['10.0.0.3', '10.1.0.3'], '[::]:99'),
            ('node03', [], '[::]:99'),
            ('203.0.113.9', ['203.0.113.9'], '[::]:99'),  # NAT
        ],
    )
    def test_by_address(self, monkeypatch, host, found, expected):
        def server(where, port):
            if where.startswith('203'):
                raise OSError('not an address of this host')
            return contextlib.nullcontext()

        monkeypatch.setattr(addresses, 'listen', server)
        monkeypatch.setattr(addresses, 'resolve', lambda *_: [(0, 0, 0, '', (one, 99)) for one in found])
        assert addresses.listen_address(f'{host}:99') == expected

    def test_asked(self, monkeypatch):
        monkeypatch.setenv(addresses.BIND, '0.0.0.0:98')
        assert addresses.listen_address('node03:99') == '0.0.0.0:98'
        monkeypatch.setenv(addresses.BIND, '0.0.0.0')
        with pytest.raises(UsageError, match='JAX_COORDINATOR_BIND_ADDRESS=0.0.0.0 is not host:port'):
            addresses.listen_address('node03:99')

    def test_all_interfaces_are_said(self, capsys):
        """203.0.113.9 is nobody's."""
        with pytest.raises(ProcessLost):
            processes.roll_call(f'203.0.113.9:{free_port()}', 2, 0, 0.1, 'digest')
        assert '203.0.113.9 is not one address of this host, so process 0 listens on all' in capsys.readouterr().err


def built(**changes):
    values = configs.default()
    values.update_from_flattened_dict(changes)
    return values


class TestSecret:
    @pytest.mark.parametrize(
        'given, expected',
        [
            ({}, ''),
            ({'SLURM_JOB_ID': '7'}, '7'),
            ({'SLURM_JOB_ID': '7', 'OMPI_MCA_orte_hnp_uri': '1.0;tcp://10.0.0.1:3'}, '1.0;tcp://10.0.0.1:3'),
            ({'SLURM_JOB_ID': '7', 'JAX_PROCESS_ID': '0'}, ''),  # each may be a job of its own
            ({'SLURM_JOB_ID': '7', 'JAX_PROCESS_ID': '0', 'MIXLN_JAX_SECRET': 'hush'}, 'hush'),
        ],
    )
    def test_of_the_environment(self, monkeypatch, given, expected):
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        assert processes._shared_secret() == expected

    def test_of_the_key(self, monkeypatch, tmp_path):
        """It comes before the environment's, and is no part of the digest."""
        heard = []
        monkeypatch.setenv('MIXLN_JAX_SECRET', 'psst')
        monkeypatch.setattr(processes, 'find', lambda: ('127.0.0.1:9', 2, 1))

        def roll_call(*arguments):
            heard.append(arguments)
            raise ProcessLost('enough')

        monkeypatch.setattr(processes, 'roll_call', roll_call)
        for secret in ('hush', ''):
            with pytest.raises(ProcessLost, match='enough'):
                main.run(built(**{'processes.secret': secret, 'processes.timeout': 3}), tmp_path)
        assert [arguments[-1] for arguments in heard] == ['hush', 'psst'] and heard[0][:-1] == heard[1][:-1]

    def test_is_never_shown(self, tmp_path):
        values, recipe = built(**{'processes.secret': '8642'}), tmp_path / 'recipe.py'
        config = configs.build(values)
        assert config.processes.secret == '8642'
        shown = [repr(config), json.dumps(workdir.resolved_config(config, families.from_config(config.model)))]
        assert '"secret": ""' in shown[1]
        recipe.write_text(
            'from mixln_jax import config\n\n\ndef get_config():\n    made = config.default()\n'
            '    made.processes.secret = 8642\n    return made\n'
        )
        for job in (lambda: recipes.load(str(recipe)), lambda: configs.build({'processes': {'secret': 8642}})):
            with pytest.raises(UsageError, match='secret must be') as refused:
                job()
            shown.append(str(refused.value))
        with pytest.raises(UsageError, match="unexpected argument '--processes.secret', did you mean"):
            recipes.overrides(['--processes.secret=8642'])
        assert not any('8642' in text for text in [*shown, recipes.help_text(values)])

    @pytest.mark.parametrize('words', [['--config.processes.secret=86 42'], ['--config.processes.secret', '8642']])
    def test_is_no_part_of_the_command_that_is_kept(self, monkeypatch, words):
        monkeypatch.setattr('sys.argv', ['main', *words, '--config.seed=1'])
        command = environment.environment(jax.devices())['command']
        assert '42' not in str(command) and 'processes.secret' in str(command) and command[-1] == '--config.seed=1'


class TestSignals:
    @pytest.mark.parametrize(
        'number, by, within',
        [
            (0, signal.SIGTERM, 'roll call'),
            (1, signal.SIGTERM, 'roll call'),
            (0, signal.SIGINT, 'roll call'),
            (1, signal.SIGHUP, 'roll call'),
            (0, signal.SIGTERM, 'initialize'),
            (1, signal.SIGTERM, 'initialize'),
            (1, signal.SIGTERM, 'a name that nobody resolves'),
        ],
    )
    def test_end_the_start(self, monkeypatch, tmp_path, number, by, within):
        """At once, with code 75: there is nothing to save yet."""
        monkeypatch.setattr(processes, 'find', lambda: (f'127.0.0.1:{free_port()}', 2, number))
        if within == 'initialize':
            monkeypatch.setattr(processes, 'roll_call', lambda *_: {})
            monkeypatch.setattr(jax.config, 'update', lambda *_: None)
            monkeypatch.setattr(jax.distributed, 'initialize', lambda *_, **__: time.sleep(3))
        elif within != 'roll call':
            monkeypatch.setattr(socket, 'getaddrinfo', lambda *_, **__: time.sleep(3))
        stop = signals.Stop()
        before = signal.signal(by, stop._handle)
        begun = time.monotonic()
        threading.Timer(0.1, os.kill, (os.getpid(), by)).start()
        try:
            with pytest.raises(Stopped, match=f'stopped by {by.name}'):
                main.run(built(**{'processes.timeout': 3.0}), tmp_path / 'run', stop)
        finally:
            signal.signal(by, before)
        assert time.monotonic() - begun < 2.5 and not (tmp_path / 'run').exists()
