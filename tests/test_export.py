"""The export command: what it writes of a run, what it checks, what it refuses, and that nothing half is left."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tokenizers as library
import vocabularies

from mixln_jax import export, main, recipes
from mixln_jax.data import tokenizer_json
from mixln_jax.models.hf import llama as hf_llama
from mixln_jax.runs import weights
from mixln_jax.system.errors import UsageError

GOLDEN = pathlib.Path(__file__).parent / 'golden'
ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    keys = {
        'num_steps': 2, 'batch_size': 4, 'seq_length': 16, 'checkpoint.every': 1, 'eval.tokens': 50, 'eval.every': 0,
        'model.num_layers': 3, 'model.hidden_size': 16, 'model.num_heads': 2, 'model.intermediate_size': 24,
        'mesh.data': 1, 'model.norm_position': 'post,pre*2', 'analysis.tokens': 0,
    }  # fmt: skip
    main.run(recipes.load(f'{ROOT}/configs/quickstart.py', [(key, str(value)) for key, value in keys.items()]), folder)
    return folder


def command(*words):
    return export.main([str(word) for word in words])


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


def test_a_run(run, tmp_path, capsys):
    out = tmp_path / 'out'
    assert command('--checkpoint', run, '--out', out) == 0
    assert 'of a logit 0 (of ' in (said := capsys.readouterr().out) and 'of the perplexity 0 (of ' in said
    assert said.splitlines()[-1].startswith('read back and compared: identical (')
    here = ['config.json', 'export.json', 'model.safetensors', 'modeling_mixln.py', 'tokenizer.json']
    tokenizer = ['tokenizer/fingerprint.json', 'tokenizer/tokenizer.json', 'tokenizer_config.json']
    assert names(out) == [*here, *tokenizer] == sorted(json.loads((out / 'export.json').read_text())['files'])
    assert [path.name for path in tmp_path.iterdir()] == ['out']
    config = json.loads((out / 'config.json').read_text())
    about = {'max_position_embeddings': 16, 'bos_token_id': 257, 'eos_token_id': 258, 'vocab_size': 259}
    assert config | about == config
    before, after = weights.load(run), weights.load(out)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint
    assert command('--checkpoint', run / 'checkpoints/1', '--out', tmp_path / 'one') == 0
    assert json.loads((tmp_path / 'one/export.json').read_text())['step'] == 1
    assert not np.array_equal(weights.load(tmp_path / 'one').params['norm']['scale'], after.params['norm']['scale'])


def test_bfloat16_and_shards(tmp_path, capsys):
    out = tmp_path / 'out'
    folder = ('--checkpoint', GOLDEN / 'mix', '--norm_position', 'mix', '--out', out, '--dtype', 'bfloat16')
    assert command(*folder, '--max_shard_gb', '1e-4') == 0
    said = capsys.readouterr().out
    assert float(said.split('difference of a logit ')[1].split()[0]) > 0
    assert said.splitlines()[-1].startswith('read back and compared: equal up to bfloat16 (')
    assert len(list(out.glob('*.safetensors'))) == 3
    assert hf_llama.load(out)[0].norm_position == ('post',) * 2 + ('pre',) * 6
    # Written again, in one file: no shard of before is left.
    assert command(*folder) == 0
    assert names(out) == ['config.json', 'export.json', 'model.safetensors', 'modeling_mixln.py']


def test_what_a_folder_says_for_other_tools_is_kept(tmp_path):
    given = shutil.copytree(GOLDEN / 'pre', tmp_path / 'given')
    for name in ('chat_template.jinja', 'generation_config.json'):
        (given / name).write_text(f'{{"{name}": 1}}')
    assert command('--checkpoint', given, '--out', tmp_path / 'out') == 0
    for name in ('chat_template.jinja', 'generation_config.json'):
        assert (tmp_path / 'out' / name).read_text() == f'{{"{name}": 1}}'
    config = json.loads((tmp_path / 'out/config.json').read_text())
    assert (config['max_position_embeddings'], config['bos_token_id'], config['eos_token_id']) == (256, 0, 1)
    assert (config['model_type'], config['pad_token_id']) == ('llama', None)


@pytest.mark.parametrize(
    'words, code, message',
    [
        (['--checkpoint', GOLDEN / 'mix'], 5, 'layer 0 has post_feedforward_layernorm: not Pre-LN; pass norm_position'),
        (['--checkpoint', GOLDEN / 'nowhere'], 2, 'nowhere is not a folder'),
        (['--checkpoint', GOLDEN / 'pre', '--dtype', 'int8'], 2, "invalid choice: 'int8'"),
        (['--checkpoint', GOLDEN / 'pre', '--format', 'timm'], 2, 'pre is not a ViT, which alone is written so'),
        (['--checkpoint', GOLDEN / 'pre', '--max_shard_gb', '0'], 2, 'max_shard_gb=0.0 must be above 0'),
        ([], 2, '--checkpoint'),
    ],
)
def test_bad_words(tmp_path, capsys, words, code, message):
    assert command(*words, '--out', tmp_path / 'out') == code
    assert message in (said := capsys.readouterr().err) and said.count('\n') == 1
    assert not list(tmp_path.iterdir())


def test_pickles_are_not_opened(tmp_path, capsys):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in/pytorch_model.bin').write_bytes(b'')
    assert command('--checkpoint', tmp_path / 'in', '--out', tmp_path / 'out') == 5
    assert 'safetensors is needed' in capsys.readouterr().err


def test_a_folder_of_somebody_else_stays(tmp_path, capsys):
    out = tmp_path / 'out'
    pre = ('--checkpoint', GOLDEN / 'pre', '--out', out)
    assert command(*pre) == 0
    (out / 'notes').mkdir()
    (out / 'notes/mine.txt').write_text('mine')
    before = names(out)
    assert command(*pre) == 2
    assert 'holds what is not an export of ours: notes' in capsys.readouterr().err
    assert names(out) == before
    (tmp_path / 'file').write_text('mine')
    assert command('--checkpoint', GOLDEN / 'pre', '--out', tmp_path / 'file') == 2
    assert (tmp_path / 'file').read_text() == 'mine'


def test_other_numbers_are_found_and_nothing_is_left(tmp_path, capsys, monkeypatch):
    """What is written wrongly never gets its name, and what was there stays."""
    out = tmp_path / 'out'
    pre = ('--checkpoint', GOLDEN / 'pre', '--out', out)
    assert command(*pre) == 0
    before = (out / 'model.safetensors').read_bytes()
    whole = hf_llama.save

    def wrong(folder, model, params, *rest):
        gain = params['norm']['scale']
        whole(folder, model, params | {'norm': {'scale': gain.at[3].set(np.nextafter(gain[3], 9))}}, *rest)

    monkeypatch.setattr(hf_llama, 'save', wrong)
    assert command(*pre) == 5
    assert 'read back, its logits differ' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['out']
    assert (out / 'model.safetensors').read_bytes() == before


@pytest.mark.parametrize('name', ['empty', 'link', 'config.json', 'mine', 'a/config.json'])
def test_what_no_export_writes_is_not_replaced(tmp_path, name):
    """Whatever export.json lists."""
    (path := tmp_path / name).parent.mkdir(exist_ok=True)
    if name in ('empty', 'config.json'):
        path.mkdir()
    elif name == 'link':
        path.symlink_to(GOLDEN)
    else:
        path.write_text('')
    listed = ['mine', 'link', 'a/config.json', '../mine', '/etc/passwd', 'export.json']
    (tmp_path / 'export.json').write_text(json.dumps({'files': listed}))
    with pytest.raises(UsageError, match=f'holds what is not an export of ours: {name.split("/")[0]}'):
        export._check_replaceable(tmp_path)


@pytest.mark.parametrize('out', ['', '..', 'inside/it'])
def test_the_checkpoint_is_not_written_over(capsys, out):
    before = names(GOLDEN)
    assert command('--checkpoint', GOLDEN / 'pre', '--out', GOLDEN / 'pre' / out) == 2
    assert 'are one, or one is inside the other' in capsys.readouterr().err
    assert names(GOLDEN) == before


@pytest.mark.parametrize('name', ['bytes', *vocabularies.KINDS])
def test_tokenizers_for_transformers_give_the_same_ids(tmp_path, opened, name):
    tokenizer = opened(name)
    out = tmp_path / 'out'
    assert tokenizer.export(out) == (name != 'llama')  # its merges are not in the file
    if name == 'llama':
        assert not out.exists()
        return
    made = library.Tokenizer.from_file(str(out / 'tokenizer.json'))
    for text in ('Größe  3 §', '\n\ta b ', *vocabularies.prose(50, seed=1)):
        assert made.encode(text, add_special_tokens=False).ids == tokenizer.encode(text).tolist()
    ids = tokenizer.encode(vocabularies.words()[0])
    assert made.decode(ids.tolist()) == tokenizer.decode(ids)
    settings = json.loads((out / 'tokenizer_config.json').read_text())
    assert made.token_to_id(settings['eos_token']) == tokenizer.eos_id
    assert settings['tokenizer_class'] == 'PreTrainedTokenizerFast'


def test_a_tokenizer_with_other_ids_is_not_written(tmp_path, opened, monkeypatch):
    monkeypatch.setitem(
        tokenizer_json._CONVERTERS, 'bytes', lambda _: library.Tokenizer.from_buffer(vocabularies.unigram())
    )
    assert not opened('bytes').export(tmp_path / 'out')
