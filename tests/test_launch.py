"""The launch scripts: as shellcheck reads them, with a gcloud that only writes down what it is asked, and for real."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import nbclient
import nbformat
import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / 'launch'


def run(script, *words, **environment):
    return subprocess.run(
        [LAUNCH / script, *map(str, words)],
        env=os.environ | environment,
        cwd=LAUNCH.parent,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_shellcheck():
    scripts = sorted(path for path in LAUNCH.iterdir() if path.suffix in ('.sh', '.sbatch'))
    assert len(scripts) == 5
    checked = subprocess.run(['shellcheck', *scripts], capture_output=True, text=True)
    assert not checked.returncode, checked.stdout


@pytest.fixture
def gcloud(tmp_path):
    """(environment, asked): a gcloud on the PATH; `asked()` is what it was asked, word by word."""
    log, fake = tmp_path / 'asked', tmp_path / 'gcloud'
    fake.write_text(
        f'#!/bin/bash\nprintf "%s\\0" "${{@//$\'\\n\'/ }}" >> {log}\necho >> {log}\n'
        f'[[ $4 != scp ]] || cp "$5" {tmp_path}/copied\n'
    )
    fake.chmod(0o755)

    def asked():
        return [line.split('\0')[:-1] for line in log.read_text().splitlines()] if log.exists() else []

    return {'PATH': f'{tmp_path}:{os.environ["PATH"]}'}, asked


class TestTpu:
    SAID = {
        'create': ['create', 'pod', '--accelerator-type=v5litepod-16', '--version=v2-alpha-tpuv5-lite'],
        'tail': ['ssh', 'pod', '--worker=0', '--command=tail -n 50 -F mixln_jax/train.log'],
        'stop': ['ssh', 'pod', '--worker=all', "--command=pkill -TERM -f '[a]gain.sh python -m mixln_jax'"],
        'delete': ['delete', 'pod', '--quiet'],
    }

    @pytest.mark.parametrize('command', SAID)
    def test_commands(self, gcloud, command):
        environment, asked = gcloud
        more = ['v5litepod-16'] if command == 'create' else []
        assert run('tpu_vm.sh', command, 'pod', *more, **environment).returncode == 0
        assert asked() == [['compute', 'tpus', 'tpu-vm', *self.SAID[command], '--zone=us-central1-a']]

    def test_where_and_how(self, gcloud):
        environment, asked = gcloud
        environment |= {'ZONE': 'here', 'PROJECT': 'ours', 'SPOT': '1', 'VERSION': 'v9'}
        assert run('tpu_vm.sh', 'create', 'pod', 'v4-8', **environment).returncode == 0
        assert asked()[0][3:] == [
            *('create', 'pod', '--accelerator-type=v4-8', '--version=v9', '--spot', '--zone=here', '--project=ours')
        ]

    @pytest.mark.parametrize(
        'kind, version',
        [
            *((kind, 'tpu-ubuntu2204-base') for kind in ('v2-8', 'v3-32', 'v4-8')),
            ('v5e-8', 'v2-alpha-tpuv5-lite'),  # a common name for v5litepod
            *(('v5litepod-16', 'v2-alpha-tpuv5-lite'), ('v5p-8', 'v2-alpha-tpuv5'), ('v6e-8', 'v2-alpha-tpuv6e')),
        ],
    )
    def test_software_by_type(self, gcloud, kind, version):
        environment, asked = gcloud
        assert run('tpu_vm.sh', 'create', 'pod', kind, **environment, VERSION='').returncode == 0
        assert asked()[0][5:7] == [f'--accelerator-type={kind}', f'--version={version}']

    @pytest.mark.parametrize('kind', ['tpu7x-8', 'v5-8', 'v40-8', 'v4', 'a b'])
    def test_an_unknown_type_wants_its_software_named(self, gcloud, kind):
        environment, asked = gcloud
        ended = run('tpu_vm.sh', 'create', 'pod', kind, **environment, VERSION='')
        assert ended.returncode == 2 and not asked()
        assert f'a {kind} needs is not known here' in ended.stderr and 'set VERSION' in ended.stderr
        assert len(ended.stderr.splitlines()) == 1
        assert run('tpu_vm.sh', 'create', 'pod', kind, **environment, VERSION='v9').returncode == 0
        assert asked()[0][5:7] == [f'--accelerator-type={kind}', '--version=v9']

    def test_install(self, gcloud, tmp_path):
        environment, asked = gcloud
        assert run('tpu_vm.sh', 'install', 'pod', **environment, BUCKET='my bucket').returncode == 0
        copy, install, mount = asked()
        assert copy[3] == 'scp' and copy[4].endswith('/mixln_jax.tgz') and copy[5:7] == ['pod:', '--worker=all']
        assert 'jax[tpu]' in install[6] and '-r requirements.txt' in install[6]
        # What is copied is a whole checkout for the worker, unpacked over one that is there.
        home = tmp_path / 'home'
        home.mkdir()
        shutil.copy(tmp_path / 'copied', home / 'mixln_jax.tgz')
        unpack = install[6].removeprefix('--command=').partition(' && cd ')[0]
        for _ in range(2):
            subprocess.run(['bash', '-c', unpack], cwd=home, check=True)
        assert {'mixln_jax/main.py', 'launch/again.sh', 'configs/llama_1b.py', 'requirements.txt'} <= {
            str(path.relative_to(home / 'mixln_jax')) for path in (home / 'mixln_jax').rglob('*')
        }
        assert mount[6] == r'--command=mkdir -p bucket && gcsfuse --implicit-dirs my\ bucket bucket'

    def test_start_passes_every_word_on(self, gcloud, tmp_path):
        """Through two shells, the worker's among them."""
        environment, asked = gcloud
        words = ['--config', 'configs/llama_1b.py', '--workdir', 'a b', '--config.data.path=c4/*.gz, $x']
        assert run('tpu_vm.sh', 'start', 'pod', *words, **environment).returncode == 0
        [command] = [word.removeprefix('--command=') for word in asked()[0] if word.startswith('--command=')]
        checkout = tmp_path / 'mixln_jax/launch'
        checkout.mkdir(parents=True)
        (checkout / 'again.sh').write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
        (checkout / 'again.sh').chmod(0o755)
        subprocess.run(['bash', '-c', f'{command}; wait'], cwd=tmp_path, check=True, capture_output=True)
        ran = (tmp_path / 'mixln_jax/train.log').read_text().splitlines()
        assert ran == ['python', '-m', 'mixln_jax.main', *words]

    def test_dry_run_prints_what_would_be_run(self, gcloud):
        environment, asked = gcloud
        words = ['start', 'pod', '--config', 'a b.py', '--workdir', 'there']
        shown = run('tpu_vm.sh', '--dry-run', *words, **environment).stdout
        assert not asked()
        run('tpu_vm.sh', *words, **environment)
        assert [shlex.split(line)[1:] for line in shown.splitlines()] == asked()

    @pytest.mark.parametrize(
        'words',
        [
            *('', 'create pod', 'create pod v4-8 more', 'start pod', 'fly pod', 'delete', 'stop --all'),
            'start pod --config x',
        ],
    )
    def test_usage(self, gcloud, words):
        environment, asked = gcloud
        ended = run('tpu_vm.sh', *words.split(), **environment)
        assert ended.returncode == 2 and ended.stderr.startswith('usage: ') and not asked()
        assert run('tpu_vm.sh', '--help').stdout == ended.stderr


class TestAgain:
    def ends(self, tmp_path, *codes, **environment):
        """again.sh on a command that ends with these codes, one after the other, then with 0."""
        script = tmp_path / 'command'
        (tmp_path / 'codes').write_text(''.join(f'{code}\n' for code in (*codes, 0)))
        script.write_text(f'cd {tmp_path}\nread -r code < codes\nsed -i 1d codes\nexit "$code"\n')
        ended = run('again.sh', 'bash', script, **{'PAUSE': '0'} | environment)
        return ended.returncode, len((tmp_path / 'codes').read_text().split())

    def test_until_it_is_done(self, tmp_path):
        assert self.ends(tmp_path, 75, 8, 134) == (0, 0)

    @pytest.mark.parametrize('code', [1, 2, 4, 6, 7, 137])
    def test_not_after_an_error(self, tmp_path, code):
        assert self.ends(tmp_path, 75, code) == (code, 1)

    def test_so_many_times_and_no_more(self, tmp_path):
        assert self.ends(tmp_path, 8, 8, 8, 8, TRIES='3') == (8, 2)

    def test_a_signal_in_the_pause_ends_it(self, tmp_path):
        script = tmp_path / 'command'
        script.write_text(f'echo >> {tmp_path}/ran\nexit 75\n')
        process = subprocess.Popen(
            [LAUNCH / 'again.sh', 'bash', script], env=os.environ | {'PAUSE': '60'}, stderr=subprocess.PIPE, text=True
        )
        assert 'once more in 60 s' in process.stderr.readline()
        process.terminate()
        assert process.wait(30) == 75 and (tmp_path / 'ran').read_text() == '\n'

    def test_a_signal_ends_it(self, tmp_path):
        code = 'import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print("up", flush=True)'
        process = subprocess.Popen(
            [LAUNCH / 'again.sh', sys.executable, '-c', f'{code}; time.sleep(60)'], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == 'up\n'
        process.terminate()
        assert process.wait(30) == 75 and process.stdout.read() == ''


class TestNotebook:
    NOTEBOOK = LAUNCH / 'colab_demo.ipynb'

    def test_its_outputs_are_of_one_run_from_top_to_bottom(self):
        cells = [cell for cell in nbformat.read(self.NOTEBOOK, 4).cells if cell.cell_type == 'code']
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        assert 'output_type": "error"' not in (text := self.NOTEBOOK.read_text())
        assert text.count('"image/png"') == 2 and text.count('eval at step 250') == 2

    @pytest.mark.slow
    def test_it_runs(self, tmp_path):
        for name in ('mixln_jax', 'configs'):
            (tmp_path / name).symlink_to(LAUNCH.parent / name)
        (tmp_path / 'launch').mkdir()
        notebook = nbformat.read(self.NOTEBOOK, 4)
        for cell in notebook.cells:
            if cell.cell_type == 'code':
                cell.outputs, cell.execution_count = [], None
        where = {'metadata': {'path': str(tmp_path / 'launch')}}
        nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()
        shown = [output for cell in notebook.cells for output in cell.get('outputs', [])]
        text = ''.join(output.text for output in shown if output.output_type == 'stream')
        assert len([output for output in shown if 'image/png' in output.get('data', {})]) == 2
        bits = [float(re.search(rf'{name}: (\d\.\d+) bits per byte', text)[1]) for name in ('Pre-LN', 'Mix-LN')]
        assert all(1 < number < 4 for number in bits)  # it has learnt: 8 at the start
        assert (tmp_path / 'runs/colab_demo/mix/checkpoints/250').is_dir()


class TestSlurm:
    def ends(self, tmp_path, code, **environment):
        """(exit code, what srun was asked, what scontrol was asked) where srun ends with `code`."""
        for name, ended in (('srun', code), ('scontrol', 0)):
            fake = tmp_path / name
            fake.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/asked_{name}\nexit {ended}\n')
            fake.chmod(0o755)
        there = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '17'} | environment
        words = ['bash', LAUNCH / 'slurm.sbatch', '--config', 'a b.py']
        ended = subprocess.run(words, env=os.environ | there, capture_output=True, text=True, timeout=60)
        asked = [tmp_path / f'asked_{name}' for name in ('srun', 'scontrol')]
        return ended.returncode, *(path.read_text().splitlines() if path.exists() else [] for path in asked)

    def test_queued_again(self, tmp_path):
        ended, srun, scontrol = self.ends(tmp_path, 255)
        assert ended == 0 and scontrol == ['requeue', '17']
        assert srun[-5:] == ['python', '-m', 'mixln_jax.main', '--config', 'a b.py']

    @pytest.mark.parametrize('code, of_task', [(0, 0), (2, 2), (8, 255), (75, 255), (134, 255), (137, 137)])
    def test_what_a_task_ends_with(self, tmp_path, code, of_task):
        """Those to go on after above all others, for srun tells the highest of all tasks alone; TERM waits for them."""
        _, srun, _ = self.ends(tmp_path, 0)
        python = tmp_path / 'python'
        python.write_text(
            '#!/bin/bash\ntrap "[[ $2 = mixln_jax.main ]] && sleep 0.2; exit ' + str(code) + '" TERM\n'
            'echo up\nfor ((i = 0; i < 100; i++)); do sleep 0.1; done\n'
        )
        python.chmod(0o755)
        words = srun[srun.index('bash') :]
        process = subprocess.Popen(
            words,
            env=os.environ | {'PATH': f'{tmp_path}:{os.environ["PATH"]}'},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout.readline() == 'up\n'
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(30) == of_task

    @pytest.mark.parametrize('code, tries', [(0, ''), (2, ''), (6, ''), (137, ''), (255, '100')])
    def test_not_queued_again(self, tmp_path, code, tries):
        assert self.ends(tmp_path, code, SLURM_RESTART_COUNT=tries)[::2] == (code, [])


class TestSweep:
    @pytest.mark.parametrize('code, array, asked', [(75, '', '17'), (75, '3', '16_3'), (0, '3', ''), (2, '3', '')])
    def test_queued_again_after_a_signal(self, tmp_path, code, array, asked):
        """TERM comes to the script alone, which passes it on and waits; the other tasks of an array run on."""
        (tmp_path / 'python').write_text(
            f'#!/bin/bash\ntrap "sleep 0.2; exit {code}" TERM\necho "$*"\n'
            'for ((i = 0; i < 100; i++)); do sleep 0.1; done\n'
        )
        (tmp_path / 'scontrol').write_text(f'#!/bin/bash\necho "$*" > {tmp_path}/asked\n')
        for name in ('python', 'scontrol'):
            (tmp_path / name).chmod(0o755)
        there = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '17'}
        there |= {'SLURM_ARRAY_JOB_ID': '16', 'SLURM_ARRAY_TASK_ID': array} if array else {}
        process = subprocess.Popen(
            ['bash', LAUNCH / 'sweep.sbatch', '--config', 'a b'],
            env=os.environ | there,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == '-m mixln_jax.sweep --config a b\n'
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == (0 if asked else code)
        seen = (tmp_path / 'asked').read_text() if (tmp_path / 'asked').exists() else ''
        assert seen == (f'requeue {asked}\n' if asked else '')


class TestLocal:
    def test_each_process_knows_its_number_and_devices(self, tmp_path):
        fake = tmp_path / 'python'
        fake.write_text(
            '#!/bin/bash\nsaid="$JAX_PROCESS_ID/$JAX_NUM_PROCESSES $CUDA_VISIBLE_DEVICES"\n'
            'echo "$said $JAX_COORDINATOR_ADDRESS ${#MIXLN_JAX_SECRET} $*"\n'
            'exit $((JAX_PROCESS_ID == 1 ? 8 : 137))\n'
        )
        fake.chmod(0o755)
        ended = run(
            'local_processes.sh', 2, '--config', 'a b', PYTHON=str(fake), CUDA_VISIBLE_DEVICES='4,5,6,7', PORT='99'
        )
        assert ended.returncode == 8
        said = ' 127.0.0.1:99 32 -m mixln_jax.main --config a b'
        assert sorted(ended.stdout.splitlines()) == [f'0/2 4,5{said}', f'1/2 6,7{said}']

    @pytest.mark.parametrize('words, gpus', [('', ''), ('x --config a', ''), ('0', ''), ('2 --config a', '0,1,2')])
    def test_usage(self, words, gpus):
        ended = run('local_processes.sh', *words.split(), CUDA_VISIBLE_DEVICES=gpus)
        assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
