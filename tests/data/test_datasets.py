"""TensorFlow data sets: small ones, written here, read without TensorFlow."""

import itertools
import json
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source
from array_record.python.array_record_module import ArrayRecordWriter
from data_sets import SHARDS, write
from etils import epath
from tensorflow_datasets.core.file_adapters import ParquetFileAdapter

from mixln_jax import config
from mixln_jax.data import datasets, sources
from mixln_jax.data.prepare import units
from mixln_jax.system.errors import DataError

TEXTS = list(itertools.chain(*SHARDS))


def open_(root, name='c4/en', split='train'):
    return datasets.Dataset(name, split, str(root))


def describe(folder, before, after):
    """Changes the description of a data set."""
    path = folder / 'dataset_info.json'
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))


def to_parquet(folder, shards=SHARDS):
    features = tfds.features.FeaturesDict({'text': tfds.features.Text()})
    for i, texts in enumerate(shards):
        examples = [(j, features.serialize_example({'text': text})) for j, text in enumerate(texts)]
        ParquetFileAdapter.write_examples(folder / f'c4-train.parquet-{i:05}-of-{len(shards):05}', examples)
    describe(folder, 'array_record', 'parquet')
    return folder


@pytest.fixture(params=['array_record', 'parquet'])
def root(tmp_path, request):
    """Above a data set of either format."""
    folder = write(tmp_path)
    if request.param == 'parquet':
        for shard in folder.glob('*array_record*'):
            shard.unlink()
        to_parquet(folder)
    return tmp_path


class TestReading:
    def test_documents(self, root):
        dataset = open_(root)
        assert len(dataset) == 13 and dataset.ends.tolist() == [5, 12, 13]
        assert [dataset[i] for i in range(13)] == dataset.__getitems__(range(13)) == TEXTS
        numbers = [12, 0, 5, 0]
        assert dataset.__getitems__(numbers) == [TEXTS[i] for i in numbers]
        assert dataset.__getitems__(np.array(numbers)) == [TEXTS[i] for i in numbers]
        assert pathlib.Path(dataset.folder) == root / 'c4/en/3.1.0'

    def test_origin(self, root):
        dataset = open_(root)
        files = [dataset.origin(i).rpartition('/')[2] for i in (0, 4, 5, 12)]
        shards = ['00000-of-00004, record 0', '00000-of-00004, record 4', '00002-of-00004, record 0']
        assert [file.partition('-')[0] for file in files] == ['c4'] * 4
        assert [file.split('-', 2)[2] for file in files] == [*shards, '00003-of-00004, record 0']
        assert pathlib.Path(dataset.origin(0).partition(',')[0]).exists()

    def test_slice(self, tmp_path):
        """TFDS's own spelling; records keep their numbers in the files."""
        write(tmp_path)
        dataset = datasets.Dataset('c4/en', 'train[3:7]', str(tmp_path))
        assert dataset.__getitems__(range(4)) == TEXTS[3:7]
        assert [dataset.origin(i)[-9:] for i in (0, 1, 2)] == [' record 3', ' record 4', ' record 0']
        assert dataset.fingerprint != open_(tmp_path).fingerprint

    def test_pickle(self, root):
        dataset = open_(root)
        dataset[3]
        for path in root.rglob('*.json'):
            path.unlink()  # a worker asks a bucket for nothing before it reads, when that has a limit
        copy = pickle.loads(pickle.dumps(dataset))
        assert copy.__getitems__(range(13)) == TEXTS
        assert copy.fingerprint == dataset.fingerprint and copy.origin(7) == dataset.origin(7)

    def test_many_shards_may_be_open(self, root, open_files):
        dataset = open_(root)
        assert open_files() > 256
        pickle.loads(pickle.dumps(dataset))
        assert open_files() > 256

    def test_fingerprint(self, tmp_path):
        def fingerprint(name, shards=SHARDS):
            return open_(write(tmp_path / name, shards).parents[2]).fingerprint

        others = {
            'content': [[text.replace('6', '7') for text in texts] for texts in SHARDS],
            'order': [texts[::-1] for texts in SHARDS],
            'shards': [TEXTS],
            'length': [[*texts, 'more'] for texts in SHARDS],
        }
        first = fingerprint('same')
        assert open_(write(tmp_path / 'moved', folder='d/1.0.0').parents[1], 'd').fingerprint == first
        assert len({first, *(fingerprint(name, shards) for name, shards in others.items())}) == 5
        many = [str(i) for i in range(100, 200)]  # the sample is spread over all
        assert fingerprint('many', [many]) != fingerprint('last', [[*many[:-1], '200']])

    def test_open_source(self, root):
        data = config.Data(source='tfds', name='c4/en:3.1.0', data_dir=str(root))
        assert sources.open_source(data, 'train')[7] == TEXTS[7]
        with pytest.raises(DataError, match='no split validation'):
            sources.open_source(data, 'validation')

    def test_threads(self, root):
        dataset = open_(root)
        found = []
        threads = [threading.Thread(target=lambda: found.append(dataset.__getitems__(range(13)))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [TEXTS] * 8


class TestChoosing:
    def test_version(self, tmp_path):
        for version in ('9.0.0', '10.0.0', '2.1.0'):
            write(tmp_path, [[version]], f'c4/en/{version}')
        (tmp_path / 'c4/en/11.0.0').mkdir()  # being written
        (tmp_path / 'c4/en/latest').mkdir()
        assert open_(tmp_path)[0] == '10.0.0'
        assert open_(tmp_path, 'c4/en:2.1.0')[0] == '2.1.0'
        assert open_(tmp_path, 'c4/en:9.0.0')[0] == '9.0.0'

    def test_the_home_folder_and_the_default(self, tmp_path, monkeypatch):
        write(tmp_path / 'tensorflow_datasets')
        monkeypatch.setenv('HOME', str(tmp_path))
        assert len(open_('~/tensorflow_datasets')) == 13
        monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', '~/tensorflow_datasets')
        assert len(open_('')) == 13

    @pytest.mark.parametrize('fields', [('text', 'url'), ('article',)])
    def test_field(self, tmp_path, fields):
        write(tmp_path, fields=fields)
        assert open_(tmp_path)[2] == TEXTS[2]

    def test_text_goes_before_other_fields(self, tmp_path):
        write(tmp_path, fields=('url', 'text'))
        assert open_(tmp_path)[2] == ''


def remove(shard):
    shard.unlink()


def empty(shard):
    shard.write_bytes(b'')


def cut(shard):
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])


def cut_one(shard):
    shard.write_bytes(shard.read_bytes()[:-1])


class TestErrors:
    @pytest.mark.parametrize('name', ['none', 'c4', 'c4/en:1.0.0', 'c4/en/3.1.0'])
    def test_no_such_data_set(self, tmp_path, name):
        write(tmp_path)
        with pytest.raises(DataError, match=f'no data set {tmp_path}/{name.replace(":", "/")}.*dataset_info.json'):
            open_(tmp_path, name)

    def test_no_such_split(self, root):
        with pytest.raises(DataError, match=f'{root}/c4/en/3.1.0: no split test .*train'):
            open_(root, split='test')

    @pytest.mark.parametrize('damage', [remove, empty, cut, cut_one])
    def test_bad_shard(self, root, damage):
        [shard] = (root / 'c4/en/3.1.0').glob('*-00002-of-00004')
        damage(shard)
        with pytest.raises(DataError, match=str(shard)) as caught:
            open_(root)
        assert '\n' not in str(caught.value)

    def test_wrong_count(self, root):
        describe(root / 'c4/en/3.1.0', '"7"', '"8"')
        with pytest.raises(DataError, match='7 records, but dataset_info.json has 8|13 records, not 14'):
            open_(root)

    def test_damaged_record(self, tmp_path):
        rng = np.random.default_rng(0)
        texts = [f'{i:04} ' + rng.bytes(2000).hex() for i in range(200)]
        folder = write(tmp_path, [texts[:50], texts[50:]])
        shard = folder / 'c4-train.array_record-00001-of-00002'
        content = bytearray(shard.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 8] = b'\0' * 8
        shard.write_bytes(content)
        dataset, damaged, message = open_(tmp_path), [], ''
        for i in range(200):
            try:
                assert dataset[i] == texts[i]
            except DataError as error:
                damaged.append(i)
                message = str(error)
        assert len(damaged) == 1 and damaged[0] > 100
        assert message.startswith(f'{shard}, record {damaged[0] - 50}: cannot be read: ')
        with pytest.raises(DataError) as caught:
            dataset.__getitems__([60, 3, *damaged, 61])
        assert str(caught.value) == message
        assert dataset.__getitems__([60, 3, 61]) == [texts[60], texts[3], texts[61]]

    def test_shard_that_is_cut_short_while_open(self, tmp_path):
        shard = write(tmp_path, [['good'], [np.random.default_rng(0).bytes(10**6).hex()] * 2])
        shard /= 'c4-train.array_record-00001-of-00002'
        dataset = open_(tmp_path)
        os.truncate(shard, 70_000)
        assert dataset[0] == 'good'
        with pytest.raises(DataError, match=f'{shard}, record 1: '):
            dataset.__getitems__([0, 2])

    @pytest.mark.parametrize('text', [b'caf\xe9', b'\xed\xa0\x80'])
    def test_no_utf8(self, tmp_path, text):
        folder = write(tmp_path, [['good'] * 50, ['good'] * 9 + [text] + ['good'] * 50])
        dataset = open_(tmp_path)
        assert dataset[58] == dataset[60] == 'good'
        with pytest.raises(DataError, match=f'{folder}/.*-00001-of-00002, record 9: no text in `text`: .*utf-8'):
            dataset.__getitems__([58, 59])

    def test_no_example(self, tmp_path):
        folder = write(tmp_path)
        writer = ArrayRecordWriter(str(folder / 'c4-train.array_record-00003-of-00004'), 'group_size:1')
        writer.write(b'rubbish')
        writer.close()
        with pytest.raises(DataError, match='-00003-of-00004, record 0: no text in `text`'):
            open_(tmp_path)

    def test_formats_without_random_access(self, tmp_path):
        folder = write(tmp_path)
        describe(folder, 'array_record', 'tfrecord')
        with pytest.raises(DataError, match=f'tfrecord .*tfds convert_format --dataset_dir={folder}'):
            open_(tmp_path)

    def test_parquet_beyond_memory(self, tmp_path, monkeypatch):
        to_parquet(write(tmp_path))
        monkeypatch.setattr(datasets, 'IN_MEMORY', 100)
        with pytest.raises(DataError, match='parquet is read into memory as a whole'):
            open_(tmp_path)

    def test_no_text_field(self, tmp_path):
        write(tmp_path, fields=('url', 'title'))
        with pytest.raises(DataError, match=r'no field `text` \(fields: (url, title|title, url)\)'):
            open_(tmp_path)

    def test_a_text_that_is_a_number(self, tmp_path):
        tfds.features.FeaturesDict({'text': tfds.features.Scalar(np.int64)}).save_config(write(tmp_path))
        with pytest.raises(DataError, match=r'no field `text` \(fields: text\)'):
            open_(tmp_path)

    def test_no_records(self, tmp_path):
        write(tmp_path, [[], []])
        with pytest.raises(DataError, match='split train has no records'):
            open_(tmp_path)

    @pytest.mark.parametrize('content', ['', '[]', '{}', json.dumps({'name': 'c4', 'version': '3.1.0', 'splits': 7})])
    def test_bad_description(self, tmp_path, content):
        (write(tmp_path) / 'dataset_info.json').write_text(content)
        with pytest.raises(DataError, match=str(tmp_path)):
            open_(tmp_path)

    def test_no_features(self, tmp_path):
        (write(tmp_path) / 'features.json').unlink()
        with pytest.raises(DataError, match=f'c4/en in {tmp_path}: cannot be read'):
            open_(tmp_path)


class Bucket:
    """As far as a data set sees a bucket before it opens anything in it."""

    def __init__(self, iterdir):
        self.iterdir = iterdir

    def expanduser(self):
        return self


class TestBuckets:
    @pytest.fixture
    def bucket(self, monkeypatch):
        return lambda iterdir: monkeypatch.setattr(datasets.epath, 'Path', lambda path: Bucket(iterdir))

    def test_no_answer(self, bucket, monkeypatch):
        answers = threading.Event()
        monkeypatch.setattr(datasets, 'TIME_OUT', 0.05)
        bucket(answers.wait)
        with pytest.raises(DataError, match='gs://bucket: no answer within 0.05 s'):
            open_('gs://bucket')
        answers.set()

    @pytest.mark.parametrize(
        'error, message', [(OSError('no\nway'), 'no$'), (ImportError('install gcsfs'), 'install gcsfs$')]
    )
    def test_a_bad_answer(self, bucket, error, message):
        def fail():
            raise error

        bucket(fail)
        with pytest.raises(DataError, match=f'gs://bucket: .*{message}'):
            open_('gs://bucket')


NO_ANSWER = r'no answer within 0.3 s; is there a network\?$'


class TestSilentBuckets:
    """A folder stands for a bucket here. What hangs does so until the test ends."""

    @pytest.fixture
    def remote(self, tmp_path, monkeypatch):
        write(tmp_path)
        paths = types.SimpleNamespace(Path=lambda path: epath.Path(path.removeprefix('bucket://')))
        monkeypatch.setattr(datasets, 'epath', paths)
        monkeypatch.setattr(datasets, 'TIME_OUT', 0.3)
        monkeypatch.setattr(datasets, 'PATIENCE', 0.3)
        return f'bucket://{tmp_path}'

    @pytest.fixture
    def answers(self):
        event = threading.Event()
        yield event
        event.set()

    @pytest.fixture
    def silent_shard(self, answers, monkeypatch):
        """The third shard is read only where `answers` is set."""
        create = array_record_data_source._create_reader

        class Reader:
            def __init__(self, path, options):
                self._reader, self._hangs = create(path, options), '-00002-of-' in path

            def writer_options_string(self):
                return self._reader.writer_options_string()

            def read(self, positions):
                if self._hangs:
                    answers.wait()
                return self._reader.read(positions)

        monkeypatch.setattr(array_record_data_source, '_create_reader', Reader)

    @pytest.mark.parametrize('kind', ['array_record', 'parquet'])
    def test_while_they_answer_the_documents_are_the_same(self, remote, tmp_path, kind):
        if kind == 'parquet':
            to_parquet(tmp_path / 'c4/en/3.1.0')
        dataset = open_(remote)
        assert dataset.fingerprint == open_(tmp_path).fingerprint
        before = threading.active_count()
        for _ in range(20):
            assert dataset.__getitems__(np.arange(13)) == TEXTS and dataset[12] == TEXTS[12]
        copy = pickle.loads(pickle.dumps(dataset))
        assert copy.__getitems__([12, 0, 12]) == [TEXTS[12], TEXTS[0], TEXTS[12]]
        deadline = time.monotonic() + 10
        while threading.active_count() > before:  # no thread stays
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def test_description(self, remote, answers, monkeypatch):
        monkeypatch.setattr(datasets.tfds, 'builder_from_directory', lambda path: answers.wait())
        with pytest.raises(DataError, match=f'^c4/en in {remote}: {NO_ANSWER}'):
            open_(remote)

    def test_opening_a_shard(self, remote, tmp_path, answers, monkeypatch):
        reader = datasets.ArrayRecordReader
        monkeypatch.setattr(
            datasets, 'ArrayRecordReader', lambda path: answers.wait() if '-00002-of-' in path else reader(path)
        )
        with pytest.raises(DataError, match=f'^{tmp_path}/c4/en/3.1.0/.*-00002-of-00004: {NO_ANSWER}'):
            open_(remote)

    def test_opening_parquet(self, remote, tmp_path, answers, monkeypatch):
        to_parquet(tmp_path / 'c4/en/3.1.0')
        monkeypatch.setattr(tfds.core.DatasetBuilder, 'as_data_source', lambda *_, **__: answers.wait())
        with pytest.raises(DataError, match=r'^.*/c4/en/3.1.0: no answer within 0.300\d+ s'):
            open_(remote)

    def test_the_first_records(self, remote, silent_shard):
        with pytest.raises(DataError, match=rf'-00002-of-00004, record \d: {NO_ANSWER}'):
            open_(remote)

    def test_a_record(self, remote, answers, silent_shard):
        answers.set()
        dataset = open_(remote)
        answers.clear()
        assert dataset.__getitems__([0, 12, 4]) == [TEXTS[0], TEXTS[12], TEXTS[4]]
        for read in (lambda: dataset.__getitems__([0, 6, 12]), lambda: dataset[6]):
            with pytest.raises(DataError, match=f'-00002-of-00004, record 1: {NO_ANSWER}'):
                read()
        answers.set()
        assert dataset[6] == TEXTS[6]

    def test_no_record_is_skipped_as_malformed(self, remote, answers, silent_shard):
        data = config.Data(source='tfds', name='c4/en', data_dir=remote)
        answers.set()
        units.open_dataset(data, 'train')
        answers.clear()
        reader = units.read(data, units.Unit('train', 2, 4, 'train', 1, (5, 12)), skip_bad=10**9)
        with pytest.raises(DataError, match=NO_ANSWER):
            list(reader.pairs())
        assert reader.bad == 0

    def test_python_ends(self, remote):
        """Though a thread still waits for a record."""
        code = (
            'import sys, threading\n'
            'from array_record.python import array_record_data_source as module\n'
            'from mixln_jax.system import cli\n'
            'from mixln_jax.data import datasets\n'
            'path = datasets.epath.Path\n'
            'datasets.epath = type("", (), {"Path": lambda name: path(name.removeprefix("bucket://"))})\n'
            'class Reader:\n'
            '    writer_options_string = lambda self: "group_size:1,"\n'
            '    read = lambda self, positions: threading.Event().wait()\n'
            'module._create_reader = lambda *_: Reader()\n'
            'datasets.PATIENCE = 0.3\n'
            'sys.exit(cli.call(datasets.Dataset, "c4/en", "train", sys.argv[1]))\n'
        )
        ended = subprocess.run([sys.executable, '-c', code, remote], capture_output=True, text=True, timeout=120)
        assert ended.returncode == 4 and ended.stderr.endswith('no answer within 0.3 s; is there a network?\n')
