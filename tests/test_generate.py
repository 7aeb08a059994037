"""The command that writes text: what it prints, what it writes, what it refuses; texts, stop strings, characters."""

import gzip
import json
import math
import os
import pathlib
import re

import jax
import numpy as np
import pytest
from hf_folders import network

from mixln_jax import config as configs
from mixln_jax import export, generate, main, recipes
from mixln_jax.data import tokenizers
from mixln_jax.evaluation import generation
from mixln_jax.models import families
from mixln_jax.models.hf import llama as hf_llama
from mixln_jax.models.sampler import Completion
from mixln_jax.runs import encoder, weights
from mixln_jax.system.errors import UsageError

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run of two steps, whose bytes are random."""
    folder = tmp_path_factory.mktemp('run')
    keys = {
        'num_steps': 2, 'batch_size': 8, 'seq_length': 32, 'eval.tokens': 64, 'model.num_layers': 2,
        'model.hidden_size': 16, 'model.num_heads': 2, 'model.intermediate_size': 24, 'mesh.data': 1,
        'model.norm_position': 'post,pre+prores', 'analysis.tokens': 0, 'eval.samples': 3, 'eval.every': 1,
    }  # fmt: skip
    main.run(recipes.load(f'{ROOT}/configs/quickstart.py', [(key, str(value)) for key, value in keys.items()]), folder)
    return folder


def command(capsys, *words):
    """(exit code, standard output, standard error)."""
    code = generate.main([str(word) for word in words])
    return code, *capsys.readouterr()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_printed_and_written_text_are_one(run, tmp_path, capsys):
    words = ['--checkpoint', run, '--prompt', 'def Größe', '--max_new_tokens', 18, '--seed', 4]
    code, shown, said = command(capsys, *words)
    assert code == 0 and shown.startswith('def Größe') and '1 completions (0 stop, 1 length), 18 tokens' in said
    code, nothing, said = command(capsys, *words, '--out', tmp_path / 'a/out.jsonl')
    [line] = lines(tmp_path / 'a/out.jsonl')
    assert code == 0 and nothing == '' and f'1 completions in {tmp_path}/a/out.jsonl' in said
    assert line['prompt'] + line['completion'] + '\n' == shown
    assert [*line] == [*generate.FIELDS] and line['finish'] == 'length'
    assert len(line['ids']) == len(line['log_probs']) == 18
    assert line['completion'] == tokenizers.Bytes().decode(line['ids'])
    found, ids = weights.load(run), [258, *'def Größe'.encode(), *line['ids']]  # concat: a document follows an eos
    logits = found.model.apply({'params': found.params}, np.array([ids]))[0][0]
    expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids) - 19, len(ids) - 1), line['ids']]
    np.testing.assert_allclose(line['log_probs'], expected, rtol=0, atol=1e-5)


@pytest.fixture(scope='module')
def answering(tmp_path_factory):
    """A run that has learned answers, under the template `chatml`, for one step."""
    folder = tmp_path_factory.mktemp('answering')
    record = {'prompt': 'Who?', 'completion': 'Ann'}
    (folder / 'data.jsonl').write_text(''.join(json.dumps(record) + '\n' for _ in range(80)))
    keys = {
        'num_steps': 1, 'batch_size': 8, 'seq_length': 96, 'eval.split': 'train', 'model.num_layers': 1,
        'model.hidden_size': 16, 'model.num_heads': 2, 'model.intermediate_size': 24, 'mesh.data': 1,
        'data.source': 'jsonl', 'data.path': folder / 'data.jsonl', 'data.template': 'chatml', 'data.mode': 'pad',
        'data.held_out': 0, 'task.name': 'instructions', 'analysis.tokens': 0,
    }  # fmt: skip
    values = recipes.load(f'{ROOT}/configs/quickstart.py', [(key, str(value)) for key, value in keys.items()])
    main.run(values, folder / 'run')
    return folder / 'run'


ASKED = '<|im_start|>user\nWho?{end}\n<|im_start|>assistant\n'


@pytest.mark.parametrize(
    'record, words, before',
    [
        ({'prompt': 'Who?'}, [], ASKED),
        ({'messages': [{'role': 'user', 'content': 'Who?'}]}, [], ASKED),
        ({'messages': [{'role': r, 'content': c} for r, c in (('user', 'Who?'), ('assistant', 'A'))]}, [], ASKED),
        ({'instruction': 'Who?', 'input': ''}, [], ASKED),
        ({'instruction': 'Who?', 'output': 'A', 'answer': 3}, ['--template', 'plain'], 'Who?'),
        ({'prompt': 'Who?'}, ['--template', 'none'], 'Who?'),
    ],
)
def test_questions_have_the_template_of_the_run(answering, tmp_path, capsys, record, words, before):
    """The log-probabilities of the answer are those after the rendered question."""
    (tmp_path / 'in.jsonl').write_text(json.dumps(record))
    words = ['--checkpoint', answering, '--prompts', tmp_path / 'in.jsonl', '--max_new_tokens', 5, *words]
    code, _, said = command(capsys, *words, '--out', tmp_path / 'out.jsonl')
    assert code == 0, said
    [line] = lines(tmp_path / 'out.jsonl')
    loaded = weights.load(answering)
    first, *rest = before.split('{end}')
    end = [loaded.tokenizer.eos_id] if rest else []
    ids = [*first.encode(), *end, *''.join(rest).encode()]
    logits = loaded.model.apply({'params': loaded.params}, np.array([[*ids, *line['ids']]]))[0][0]
    expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(5) + len(ids) - 1, line['ids']]
    np.testing.assert_allclose(line['log_probs'], expected, rtol=0, atol=1e-5)
    assert {**record, 'prompt': line['prompt']} == {name: line[name] for name in {**record, 'prompt': ''}}
    assert line['prompt'] == ('Who?' if 'prompt' in record else tokenizers.Bytes().decode(ids))


def test_an_export_answers_as_its_run(answering, tmp_path, capsys):
    """Prompts may be an array, compressed as well."""
    export.export(answering, str(tmp_path / 'out'))
    (tmp_path / 'in.json.gz').write_bytes(
        gzip.compress(b'[{"prompt": "Who?"},\n {"instruction": "Who?", "input": null}]')
    )
    words = ['--prompts', tmp_path / 'in.json.gz', '--max_new_tokens', 5]
    for name, folder in (('run', answering), ('export', tmp_path / 'out')):
        code, _, said = command(capsys, '--checkpoint', folder, *words, '--out', tmp_path / f'{name}.jsonl')
        assert code == 0, said
    one, other = lines(tmp_path / 'run.jsonl'), lines(tmp_path / 'export.jsonl')
    assert [line['ids'] for line in one] == [line['ids'] for line in other] and len(one) == 2
    assert one[0]['log_probs'] == pytest.approx(other[0]['log_probs'], abs=1e-5)
    assert "'<|im_start|>assistant" in (tmp_path / 'out/chat_template.jinja').read_text()
    assert (tmp_path / 'out/model.safetensors').stat().st_mode == (tmp_path / 'out/config.json').stat().st_mode
    about = json.loads((tmp_path / 'out/export.json').read_text())
    (tmp_path / 'out/export.json').write_text(json.dumps(about | {'template': 'x'}))
    code, _, said = command(capsys, '--checkpoint', tmp_path / 'out', *words)
    assert code == 5 and "export.json: template='x' is not a template" in said


def test_an_answer_is_printed_without_its_question(answering, capsys):
    words = ['--checkpoint', answering, '--prompt', 'Who?', '--max_new_tokens', 5]
    code, shown, _ = command(capsys, *words)
    assert code == 0 and not shown.startswith('Who?')
    code, shown, _ = command(capsys, *words, '--template', 'none')
    assert code == 0 and shown.startswith('Who?')


@pytest.mark.parametrize(
    'record, words, exit_code, message',
    [
        ({'messages': [{'role': 'robot', 'content': 'a'}]}, [], 4, 'in.jsonl:1: the template chatml: .*role.*robot'),
        ({'messages': []}, [], 4, 'in.jsonl:1: messages is empty'),
        ({'messages': [{'role': 'assistant', 'content': 'a'}]}, [], 4, 'messages has nothing before the answer'),
        ({'messages': [{'role': 'user'}]}, [], 4, r'in.jsonl:1: messages\[0\].content is missing'),
        ({'prompt': 'a', 'tools': '[]'}, [], 4, 'in.jsonl:1: tools is a string, not an array'),
        ({'prompt': 'a', 'tools': [{}]}, [], 4, 'in.jsonl:1: the template chatml does not know tools'),
        ({'instruction': 3}, [], 4, 'in.jsonl:1: instruction is a number, not a string'),
        (
            {'messages': [{'role': 'user', 'content': 'a'}]},
            ['--template', 'none'],
            2,
            'a conversation needs a template',
        ),
        ({'prompt': 'a'}, ['--template', 'chat'], 4, 'this tokenizer has no chat template'),
        ({'prompt': 'a'}, ['--template', 'odd'], 2, "--template: invalid choice: 'odd'"),
    ],
)
def test_questions_that_cannot_be_asked(answering, tmp_path, capsys, record, words, exit_code, message):
    (tmp_path / 'in.jsonl').write_text(json.dumps(record))
    code, shown, said = command(capsys, '--checkpoint', answering, '--prompts', tmp_path / 'in.jsonl', *words)
    assert (code, shown, said.count('\n')) == (exit_code, '', 1), said
    assert re.search(message, said), said


def test_prompts_keep_their_order_and_fields(run, tmp_path, capsys):
    prompts = [{'prompt': 'ab', 'id': 7}, {'prompt': ''}, {'prompt': 'a' * 50, 'prompts': [1]}]
    (tmp_path / 'in.jsonl').write_text('\n'.join(map(json.dumps, prompts)) + '\n\n')
    words = ['--checkpoint', run, '--prompts', tmp_path / 'in.jsonl', '--out', tmp_path / 'out.jsonl']
    words += ['--max_new_tokens', 5, '--num_samples', 2]
    code, _, said = command(capsys, *words, '--batch_size', 4)
    made = lines(tmp_path / 'out.jsonl')
    assert code == 0 and 'warning: 2 of 6 prompts fill the window of 32 tokens and lose their beginning' in said
    assert [line['prompt'] for line in made] == [one['prompt'] for one in prompts for _ in range(2)]
    assert made[0]['id'] == made[1]['id'] == 7 and made[4]['prompts'] == [1]
    assert made[0]['ids'] != made[1]['ids'] and {len(line['ids']) for line in made} == {5}
    assert command(capsys, *words, '--batch_size', 6)[0] == 0  # the file is ours, and is replaced
    assert [line['ids'] for line in lines(tmp_path / 'out.jsonl')] == [line['ids'] for line in made]
    code, shown, _ = command(capsys, *words[:4], '--max_new_tokens', 2, '--temperature', 0)
    assert code == 0 and re.findall('^--- (.*)$', shown, re.MULTILINE) == ['1 of 3', '2 of 3', '3 of 3']


def test_a_hugging_face_folder(tmp_path, capsys):
    """Its generation_config.json names more end tokens."""
    model, params = network('mix', vocab_size=259)
    hf_llama.save(tmp_path / 'hf', model, params, tokenizers.Bytes(), about={'max_position_embeddings': 64})
    words = ['--checkpoint', tmp_path / 'hf', '--prompt', 'ab', '--out', tmp_path / 'out.jsonl']
    assert command(capsys, *words)[0] == 0
    [free] = lines(tmp_path / 'out.jsonl')
    end = max(free['ids'], key=free['ids'].index)
    (tmp_path / 'hf/generation_config.json').write_text(json.dumps({'eos_token_id': [258, end]}))
    assert command(capsys, *words)[0] == 0
    [line] = lines(tmp_path / 'out.jsonl')
    assert line['ids'] == free['ids'][: free['ids'].index(end) + 1] and line['finish'] == 'stop'
    (tmp_path / 'hf/generation_config.json').write_text('{"eos_token_id": "</s>"}')
    code, _, said = command(capsys, *words)
    assert code == 5 and "generation_config.json: eos_token_id=['</s>'] is no id of a token" in said


BAD = [
    ([], 2, 'give either --prompt TEXT or --prompts FILE.jsonl'),
    (['--prompt', 'a', '--prompts', '{good}'], 2, 'give either --prompt TEXT or --prompts FILE.jsonl'),
    (['--prompt', 'a\udcff'], 2, '--prompt: the text contains bytes that are not UTF-8'),
    (['--prompt', 'a', '--temperature', '-1'], 2, '--temperature=-1.0 must be from 0 to 1000'),
    (['--prompt', 'a', '--temperature', 'nan'], 2, "--temperature: invalid .* value: 'nan'"),
    (['--prompt', 'a', '--top_k', '-1'], 2, '--top_k=-1 must be at least 0'),
    (['--prompt', 'a', '--top_k', '2.5'], 2, "--top_k: invalid .* value: '2.5'"),
    (['--prompt', 'a', '--top_p', '0'], 2, '--top_p=0.0 must be above 0 and at most 1'),
    (['--prompt', 'a', '--max_new_tokens', '0'], 2, '--max_new_tokens must be at least 1'),
    (['--prompt', 'a', '--batch_size', '0'], 2, '--batch_size must be at least 1'),
    (['--prompt', 'a', '--num_samples', '0'], 2, '--num_samples must be at least 1'),
    (['--prompt', 'a', '--seed', '-1'], 2, '--seed must be from 0'),
    (['--prompt', 'a', '--stop', ''], 2, '--stop is empty'),
    (['--prompt', 'a', '--out', '{folder}/other.json'], 2, 'other.json is there already and holds no generated text'),
    (['--prompt', 'a', '--out', '{folder}/other.json/x'], 2, '--out .*other.json/x cannot be written'),
    (['--prompt', 'a', '--out', '{run}/checkpoints/x.jsonl'], 2, 'would change .*checkpoints, which belongs to'),
    (['--prompt', 'a', '--out', '{run}/samples/1.jsonl'], 2, 'would change .*samples, which belongs to'),
    (['--prompt', 'a', '--out', '{run}/frozen/x.jsonl'], 2, 'would change .*frozen, which belongs to'),
    (['--prompt', 'a', '--norm_position', 'pre'], 2, 'is a run of ours, which knows its placement'),
    (['--prompts', '{folder}/none.jsonl'], 4, '--prompts: there is no file .*none.jsonl'),
    (['--prompts', '{folder}'], 4, 'cannot be read: it is a folder, not a file'),
    (['--prompts', 's3://x/y'], 2, 'a path on this machine is needed'),
    *((['--prompts', f'{{folder}}/{name}'], 4, message) for name, (_, message) in {
        'empty.jsonl': ('\n\n', 'empty.jsonl: no records in this file'),
        'cut.jsonl': ('{"prompt": "a"}\n{"prompt": "b', 'cut.jsonl:2: not JSON'),
        'text.jsonl': ('{"prompt": "a"}\n\n{"text": "b"}', 'text.jsonl:3: a prompt is an object with `prompt`'),
        'array.json': ('[{"prompt": "a"},\n{"prompt": "b"', 'array.json:2: not JSON: '),
        'list.jsonl': ('["a"]', 'list.jsonl:1: a record is an object, not a string'),
        'number.jsonl': ('{"prompt": 3}', 'number.jsonl:1: prompt is a number, not a string'),
        'bytes.jsonl': ('{"prompt": "\udcff"}', 'bytes.jsonl:1: not UTF-8'),
        'half.jsonl': ('{"prompt": "\\ud800"}', 'half.jsonl:1: not JSON'),
    }.items()),
]  # fmt: skip
CONTENTS = {
    'array.json': '[{"prompt": "a"},\n{"prompt": "b"',
    'empty.jsonl': '\n\n', 'cut.jsonl': '{"prompt": "a"}\n{"prompt": "b', 'list.jsonl': '["a"]',
    'text.jsonl': '{"prompt": "a"}\n\n{"text": "b"}', 'number.jsonl': '{"prompt": 3}', 'other.json': '{"a": 1}',
    'bytes.jsonl': '{"prompt": "\udcff"}', 'half.jsonl': '{"prompt": "\\ud800"}', 'good.jsonl': '{"prompt": "a"}',
}  # fmt: skip


@pytest.mark.parametrize('words, exit_code, message', BAD)
def test_bad_input_is_one_line(run, tmp_path, capsys, words, exit_code, message):
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content.encode(errors='surrogateescape'))
    words = [word.format(run=run, folder=tmp_path, good=tmp_path / 'good.jsonl') for word in words]
    code, shown, said = command(capsys, '--checkpoint', run, *words)
    assert (code, shown, said.count('\n')) == (exit_code, '', 1), said
    assert re.search(message, said), said


def test_a_network_that_sees_both_sides(tmp_path, capsys, monkeypatch):
    model = families.from_config(configs.Model(family='bert', num_layers=1, norm_position='post'), 'float32')
    monkeypatch.setattr(weights, 'load', lambda *_: weights.Weights(model, {}, 'runs/bert'))
    code, _, said = command(capsys, '--checkpoint', 'runs/bert', '--prompt', 'a')
    assert code == 5 and said == (
        'mixln_jax: runs/bert sees both sides of a token, so it does not predict the next one\n'
    )


def test_weights_that_are_not_finite(run, capsys, monkeypatch):
    found = weights.load(run)
    found.params['norm']['scale'] = found.params['norm']['scale'] * math.nan
    monkeypatch.setattr(weights, 'load', lambda *_: found)
    code, _, said = command(capsys, '--checkpoint', run, '--prompt', 'a')
    assert code == 6 and 'not finite' in said


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_an_out_that_cannot_be_written(run, tmp_path, capsys):
    tmp_path.chmod(0o500)
    code, _, said = command(capsys, '--checkpoint', run, '--prompt', 'a', '--out', tmp_path / 'x/y.jsonl')
    tmp_path.chmod(0o700)
    assert code == 2 and 'cannot be written' in said


class Spelling:
    """A sampler that spells given texts, `steps` bytes at a time."""

    def __init__(self, texts, steps):
        self.texts, self.steps = [text.encode() for text in texts], steps

    def stream(self, params, contexts, **options):
        rows = [Completion([], []) for _ in contexts]
        while not all(row.finish for row in rows):
            for row, text in zip(rows, self.texts, strict=True):
                if not row.finish:
                    row.ids += text[len(row.ids) : len(row.ids) + self.steps]
                    row.log_probs += [0.0] * (len(row.ids) - len(row.log_probs))
                    row.finish = 'length' if len(row.ids) == len(text) else ''
            yield rows


def spelled(texts, stops, steps=1):
    """Returns the text of every look, and the last looks' continuations."""
    writer = generation.Writer(Spelling(texts, steps), None, encoder.TextEncoder(tokenizers.Bytes(), [], 258, (258,)))
    looks = []
    for batch in writer.stream([[97]] * len(texts), stops):
        looks.append([one.text for one in batch])
    return looks, batch


def test_only_whole_characters_are_shown():
    looks, _ = spelled(['aé日🎉b'], [[]])
    assert [text for [text] in looks] == [
        'a',
        'a',
        'aé',
        'aé',
        'aé',
        'aé日',
        'aé日',
        'aé日',
        'aé日',
        'aé日🎉',
        'aé日🎉b',
    ]


@pytest.mark.parametrize('steps', [1, 3, 100])
def test_stop_strings_end_a_text_and_are_no_part_of_it(steps):
    looks, [one, other, third] = spelled(
        ['one two three', 'four five', 'thwo'], [['tw', 'wo t'], ['x', 'four '], ['twx']], steps
    )
    assert (one.text, other.text, third.text) == ('one ', '', 'thwo')
    assert bytes(one.tokens.ids) == b'one tw' and bytes(other.tokens.ids) == b'four '
    assert len(one.tokens.log_probs) == 6
    assert [row.tokens.finish for row in (one, other, third)] == ['stop', 'stop', 'length']
    for texts in looks:  # nothing is shown that would have to be taken back
        assert all(final.text.startswith(text) for final, text in zip((one, other, third), texts, strict=True))


def test_samples_of_a_run(run):
    """Three continuations of the text that is evaluated, at each evaluation; metrics.jsonl does not know them."""
    assert sorted(path.name for path in (run / 'samples').iterdir()) == ['1.jsonl', '2.jsonl']
    first, last = (lines(run / f'samples/{step}.jsonl') for step in (1, 2))
    assert len(first) == len(last) == 3 and [one['prompt'] for one in first] == [one['prompt'] for one in last]
    assert {*last[0]} == {*generate.FIELDS} and all(len(one['ids']) == 16 for one in last)
    found = weights.load(run)
    for one in last:
        assert len(one['prompt']) == 16  # half of the window
        ids = [*one['prompt'].encode(), *one['ids']]
        logits = found.model.apply({'params': found.params}, np.array([ids]))[0][0]
        expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(15, 31), one['ids']]
        np.testing.assert_allclose(one['log_probs'], expected, rtol=0, atol=1e-5)


def test_samples_of_a_network_that_sees_both_sides(tmp_path):
    keys = [('eval.samples', '2'), ('device', 'cpu')]
    with pytest.raises(UsageError, match='config.eval.samples=2 has no meaning: this network sees both sides'):
        main.run(recipes.load(f'{ROOT}/configs/bert_quickstart.py', keys), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    'row, expected',
    [
        ({'loss_mask': [1, 1, 1, 1, 1]}, [0, 1, 2]),
        ({'loss_mask': [1, 1, 0, 0, 0]}, [0, 1]),  # padding follows
        ({'loss_mask': [1, 1, 1, 1, 1], 'segment_ids': [1, 1, 2, 2, 2]}, [0, 1]),
        ({'loss_mask': [0, 0, 0, 1, 1]}, [0, 1, 2, 3]),  # a prompt, as long as it is
        ({'loss_mask': [0, 0, 0, 0, 0]}, [0]),
        ({'loss_mask': [0, 0, 0, 0, 1], 'segment_ids': [1, 1, 2, 2, 2]}, [0]),
    ],
)
def test_what_of_an_example_is_continued(row, expected):
    arrays = {name: np.array(values) for name, values in row.items()}
    assert generation.context({'inputs': np.arange(5)} | arrays, 3) == expected
