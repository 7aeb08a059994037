"""The adapter to the lm-evaluation-harness: against plain loops over logits, and against the harness's own `hf` model.

Needs lm_eval, torch and transformers; offline.
"""

import json
import random
import types

import jax
import lm_eval
import numpy as np
import pytest
import tokenizers as library
import torch
import transformers
import vocabularies
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from mixln_jax import config as configs
from mixln_jax import evaluate
from mixln_jax.analysis import drop
from mixln_jax.data import tokenizers
from mixln_jax.distributed import mesh as meshes
from mixln_jax.evaluation import harness
from mixln_jax.models import families
from mixln_jax.runs import weights
from mixln_jax.system.errors import NumericsError, UsageError

V, WINDOW = 400, 40  # ids; in memory the vocabulary is padded to 512
MESHES = {'1': (1, 1, 1), '8': (8, 1, 1), '2x2x2': (2, 2, 2)}


@pytest.fixture(autouse=True)
def no_list_of_packages(monkeypatch):
    """The harness asks pip for all of them at each evaluation, which takes longer than the small ones here."""
    monkeypatch.setattr('lm_eval.evaluator.add_env_info', lambda storage: None)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """The same random LLaMA twice: its tokenizer has a bos, and puts it before a text or does not."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.15, tie_word_embeddings=False,
    )  # fmt: skip
    model, made = transformers.LlamaForCausalLM(config), {}
    for name in ('plain', 'bos'):
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
        tokenizer = library.Tokenizer.from_str(vocabularies.byte_level().decode())
        settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': '<s>', 'eos_token': '</s>'}
        if name == 'bos':
            tokenizer.post_processor = library.processors.TemplateProcessing(
                single='<s> $A', special_tokens=[('<s>', tokenizer.token_to_id('<s>'))]
            )
        tokenizer.save(str(made[name] / 'tokenizer.json'))
        (made[name] / 'tokenizer_config.json').write_text(json.dumps(settings))
    return made


@pytest.fixture(scope='module')
def found(folders):
    return weights.load(folders['plain'])


@pytest.fixture(scope='module')
def logits(found):
    """ids [n] -> log-probabilities [n,V] float64, one text at a time, nothing padded but in a run of 128."""
    apply = jax.jit(lambda ids: found.model.apply({'params': found.params}, ids)[0])

    def of(ids):
        assert 0 < len(ids) <= 128
        made = np.asarray(apply(np.pad(np.array(ids, np.int32), (0, 128 - len(ids)))[None]))[0, : len(ids)]
        made = made.astype(np.float64)
        largest = made.max(-1, keepdims=True)
        return made - largest - np.log(np.exp(made - largest).sum(-1, keepdims=True))

    return of


def on(name):
    return meshes.make_mesh(configs.Mesh(*MESHES[name]), jax.devices('cpu'))


def asked(*arguments):
    return types.SimpleNamespace(args=arguments, task_name='some_task', doc_id=0)


def pairs():
    """Contexts and continuations: most fit, some contexts do not, one is empty, one continuation fills windows."""
    rng, texts = random.Random(1), vocabularies.prose(60, seed=3)
    made = [(texts[2 * i][: rng.randrange(1, 90)], ' ' + texts[2 * i + 1][: rng.randrange(1, 30)]) for i in range(20)]
    long = ' '.join(texts[40:50])
    return [*made, ('', 'badu'), ('', long[:300]), (long, ' gi'), ('bo ', 'bi'), ('ba \n', ' ' + long[:400])]


def by_hand(logits, lm, context, continuation, window):
    """(log-likelihood, whether greedy decoding gives it), token by token."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    encode = lambda text: lm.tok_encode(text, add_special_tokens=False)  # noqa: E731
    before = encode(context) or [lm.prefix_token_id]
    ids = before + encode(context + continuation)[len(encode(context)) :]
    places = range(len(before), len(ids))
    return sum_of(logits, ids, places, window)


def sum_of(logits, ids, places, window):
    total, greedy = 0.0, True
    if len(places) <= window:  # all from one window, which ends where they end
        first, groups = 0, [places]
    else:  # side by side; none sees more than `window` tokens, and nothing before the last token of the context
        first = places[0] - 1
        groups = [places[start : start + window] for start in range(0, len(places), window)]
    for group in groups:
        inputs = ids[max(first, group[-1] - window) : group[-1]]
        made = logits(inputs)[-len(group) :]
        wanted = np.array([ids[place] for place in group])
        total += made[np.arange(len(group)), wanted].sum()
        greedy &= bool((made.argmax(-1) == wanted).all())
    return total, greedy


class TestLoglikelihood:
    @pytest.mark.parametrize('mesh', MESHES)
    def test_is_the_plain_sum(self, found, logits, mesh):
        lm = harness.Harness(found, batch_size=8, max_length=WINDOW, mesh=on(mesh))
        made = lm.loglikelihood([asked(*pair) for pair in pairs()], disable_tqdm=True)
        wanted = [by_hand(logits, lm, *pair, WINDOW) for pair in pairs()]
        lengths = [len(lm.tok_encode(a)) for a, _ in pairs()], [len(lm.tok_encode(b)) for _, b in pairs()]
        assert max(lengths[0]) > WINDOW < max(lengths[1]) and min(lengths[0]) == 0  # all kinds are there
        np.testing.assert_allclose([a for a, _ in made], [a for a, _ in wanted], rtol=1e-5)
        assert [b for _, b in made] == [b for _, b in wanted]

    def test_what_stands_beside_a_request_changes_nothing(self, found):
        wanted = harness.Harness(found, 4, WINDOW, on('1')).loglikelihood([asked(*p) for p in pairs()], True)
        order = random.Random(0).sample(range(len(wanted)), len(wanted))
        for size, mesh in ((1, '1'), (3, '1'), (7, '8'), (64, '8')):
            lm = harness.Harness(found, size, WINDOW, on(mesh))
            made = lm.loglikelihood([asked(*pairs()[i]) for i in order], disable_tqdm=True)
            for i, (value, greedy) in zip(order, made, strict=True):
                assert value == pytest.approx(wanted[i][0], rel=1e-5) and greedy == wanted[i][1]
        [alone] = lm.loglikelihood([asked(*pairs()[5])], disable_tqdm=True)
        assert alone[0] == pytest.approx(wanted[5][0], rel=1e-5)

    def test_answers_of_one_token_share_a_row(self, found, logits, monkeypatch):
        """More answers than share a row, of contexts of several lengths, in any order; each as by hand."""
        lm, rng = harness.Harness(found, 2, WINDOW, on('1')), random.Random(4)
        contexts = [[rng.randrange(3, V) for _ in range(n)] for n in (1, 7, 33, WINDOW, WINDOW + 9)]
        answers = rng.sample(range(3, V), harness.ENDS + 3)
        requests = [(None, context, [answer]) for context in contexts for answer in answers]
        requests += [(None, context, [answer, 5]) for context in contexts[:3] for answer in answers]
        rng.shuffle(requests)
        sizes, predict = [], lm._predict
        monkeypatch.setattr(lm, '_predict', lambda params, batch, mask: sizes.append(1) or predict(params, batch, mask))
        made = lm._loglikelihood_tokens(requests, disable_tqdm=True)
        assert len(sizes) == (2 * 5 + 3 * len(answers) + 1) // 2
        for (_, context, answer), (value, greedy) in zip(requests, made, strict=True):
            ids = context + answer
            wanted = sum_of(logits, ids, range(len(context), len(ids)), WINDOW)
            assert value == pytest.approx(wanted[0], rel=1e-5) and greedy == wanted[1]

    def test_greedy_is_found(self, found, logits):
        lm = harness.Harness(found, 2, WINDOW, on('1'))
        context = lm.tok_encode('the bado')
        likeliest = context + [int(logits(context)[-1].argmax())]
        likeliest.append(int(logits(likeliest)[-1].argmax()))
        second = likeliest[:-1] + [int(logits(likeliest[:-1])[-1].argsort()[-2])]
        requests = [(None, context, ids[len(context) :]) for ids in (likeliest, second)]
        assert [greedy for _, greedy in lm._loglikelihood_tokens(requests, disable_tqdm=True)] == [True, False]

    @pytest.mark.parametrize('wrong', [None, 0, WINDOW], ids=['nowhere', 'in the first window', 'in the last'])
    def test_greedy_means_every_window(self, found, logits, wrong):
        """A continuation of two windows, each token the likeliest one but for `wrong`, the second likeliest."""
        lm, ids = harness.Harness(found, 2, WINDOW, on('1')), [5]
        for place in range(WINDOW + 1):
            ids.append(int(logits(ids[-WINDOW:])[-1].argsort()[-2 if place == wrong else -1]))
        [(total, greedy)] = lm._loglikelihood_tokens([(None, ids[:1], ids[1:])], disable_tqdm=True)
        assert greedy == (wrong is None)
        assert total == pytest.approx(sum_of(logits, ids, range(1, len(ids)), WINDOW)[0], rel=1e-5)

    def test_padded_vocabulary_takes_no_part(self, found):
        params = dict(found.params, head={'kernel': found.params['head']['kernel'].at[:, V:].set(1e4)})
        poisoned = weights.Weights(found.model, params, found.where)
        requests = [asked(*pair) for pair in pairs()]
        made, wanted = (harness.Harness(w, 8, WINDOW, on('8')) for w in (poisoned, found))
        assert made.loglikelihood(requests, True) == wanted.loglikelihood(requests, True)
        options = {'until': [], 'max_gen_toks': 5}
        assert made.generate_until([asked('ba', options)], True) == wanted.generate_until([asked('ba', options)], True)

    def test_few_lengths_are_compiled(self, found):
        lm = harness.Harness(found, batch_size=2, max_length=128, mesh=on('1'))
        lm.loglikelihood([asked('ba' * n, ' du') for n in range(1, 60)], disable_tqdm=True)
        assert lm._predict._cache_size() <= 3  # 32, 64, 128

    def test_texts_that_are_cut_are_counted(self, found, capsys):
        lm = harness.Harness(found, 8, WINDOW, on('1'))
        lm.loglikelihood([asked(*pair) for pair in pairs()], disable_tqdm=True)
        sizes = [len(lm.tok_encode(context + continuation)) for context, continuation in pairs()]
        cut = sum(size + (not context) > WINDOW + 1 for size, (context, _) in zip(sizes, pairs(), strict=True))
        said = capsys.readouterr().err
        assert f'warning: {cut} of 25 texts are longer than the window of {WINDOW} tokens' in said and cut
        lm.loglikelihood_rolling([asked(' '.join(vocabularies.prose(9)))], disable_tqdm=True)
        assert not capsys.readouterr().err  # nothing is lost there

    def test_weights_that_are_not_finite(self, found):
        params = dict(found.params, norm={'scale': found.params['norm']['scale'] * float('nan')})
        lm = harness.Harness(weights.Weights(found.model, params, found.where), 1, WINDOW, on('1'))
        with pytest.raises(NumericsError, match='a log-likelihood is not finite'):
            lm.loglikelihood([asked('ba', ' du')], disable_tqdm=True)

    def test_no_continuation(self, found):
        lm = harness.Harness(found, 1, WINDOW, on('1'))
        with pytest.raises(UsageError, match=r"the continuation of \('ba', ''\) has no token of its own"):
            lm.loglikelihood([asked('ba', '')], disable_tqdm=True)


def test_rolling_is_the_sum_by_hand(found, logits):
    lm = harness.Harness(found, 4, WINDOW, on('8'))
    text = ' '.join(vocabularies.prose(12, seed=5))
    texts = ['', 'b', text[:50], text[:400], text]
    rows = [[lm.prefix_token_id, *lm.tok_encode(text)] for text in texts]
    wanted = [0.0] + [sum_of(logits, ids, range(1, len(ids)), WINDOW)[0] for ids in rows[1:]]
    counts = [len(ids) - 1 for ids in rows]
    assert counts[2] < WINDOW < counts[3] and counts[4] > 3 * WINDOW
    np.testing.assert_allclose(lm.loglikelihood_rolling([asked(text) for text in texts], True), wanted, rtol=1e-5)


class TestGeneration:
    def loop(self, logits, lm, context, count):
        """Greedy decoding without a cache; a context leaves room for `count` tokens in the window."""
        ids = (lm.tok_encode(context) or [lm.prefix_token_id])[count - WINDOW :]
        made = []
        for _ in range(count):
            made.append(int(logits(ids + made)[-1].argmax()))
            if made[-1] == lm.eot_token_id:
                return made[:-1]
        return made

    @pytest.mark.parametrize('mesh', ['1', '8'])
    def test_is_the_plain_loop(self, found, logits, mesh):
        lm, long = harness.Harness(found, 4, WINDOW, on(mesh)), ' '.join(vocabularies.prose(5, seed=7))
        contexts = ['the quick', 'ba', '', long, long[:75]]  # the last is cut, to leave room
        assert len(lm.tok_encode(contexts[-1])) < WINDOW
        options = {'until': [], 'max_gen_toks': 24, 'do_sample': False, 'temperature': 0.0}
        texts = [lm._tokenizer.decode(self.loop(logits, lm, context, 24)) for context in contexts]
        assert len(set(texts)) == len(texts) and all(texts)
        assert lm.generate_until([asked(context, options) for context in contexts], True) == texts
        stops = [text[len(text) // 2 :][:3] for text in texts]
        cut = [text[: text.index(stop)] for text, stop in zip(texts, stops, strict=True)]
        requests = [
            asked(context, options | {'until': [stop, '<never>']})
            for context, stop in zip(contexts, stops, strict=True)
        ]
        assert lm.generate_until(requests, True) == cut and cut != texts

    def test_ends_at_an_eos(self, found, logits):
        lm = harness.Harness(found, 4, WINDOW, on('1'))
        made = self.loop(logits, lm, 'the quick', 12)
        last = max(range(12), key=lambda i: i if made.index(made[i]) == i else 0)
        assert last > 0
        swap = np.arange(512)
        swap[[lm.eot_token_id, made[last]]] = made[last], lm.eot_token_id  # what was likeliest then is now an eos
        params = dict(found.params, head={'kernel': found.params['head']['kernel'][:, swap]})
        lm = harness.Harness(weights.Weights(found.model, params, found.where), 4, WINDOW, on('1'))
        [text] = lm.generate_until([asked('the quick', {'until': [], 'max_gen_toks': 12})], True)
        assert text == lm._tokenizer.decode(made[:last])

    def test_samples(self, found):
        """Requests of one task may differ in how they choose; one that says no do_sample is greedy."""
        lm, until = harness.Harness(found, 4, WINDOW, on('1')), {'until': [], 'max_gen_toks': 12}
        options = {}, {'do_sample': True, 'temperature': 1.5}, {'temperature': 1.5}, {'top_k': 5}
        greedy, sampled, also, third = lm.generate_until([asked('ba', until | given) for given in options], True)
        assert greedy == third and len({greedy, sampled, also}) == 3  # draws depend on the row
        likeliest = {'do_sample': True, 'top_k': 1, 'temperature': 1.0}
        assert lm.generate_until([asked('ba', until | likeliest)], True) == [greedy]

    def test_more_tokens_than_the_window_has(self, found):
        """The harness's own model refuses them."""
        lm = harness.Harness(found, 4, WINDOW, on('1'))
        [text] = lm.generate_until([asked('the quick' * 20, {'until': [], 'max_gen_toks': 256})], True)
        assert text

    @pytest.mark.parametrize(
        'options', [{'num_beams': 3}, {'do_sample': True, 'top_p': 1.5}, {'do_sample': True, 'temperature': -1.0}]
    )
    def test_others_are_refused(self, found, options):
        lm = harness.Harness(found, 1, WINDOW, on('1'))
        with pytest.raises(UsageError, match=f'task some_task asks for generation with .*{[*options][-1]}'):
            lm.generate_until([asked('ba', {'until': ['\n']} | options)], True)


class TestBeginnings:
    @pytest.mark.parametrize('mode, start', [('pad', []), ('pack', []), ('concat', [258])])
    def test_of_a_run_are_those_of_its_rows(self, mode, start):
        sizes = configs.Model(vocab_size=259, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)
        config = configs.Config(seq_length=16, model=sizes, data=configs.Data(mode=mode, tokenizer='bytes'))
        model = families.from_config(sizes, 'float32')
        params = model.init(jax.random.key(0))['params']
        lm = harness.Harness(weights.Weights(model, params, '', 1, config, tokenizers.Bytes()), 1, mesh=on('1'))
        assert lm.max_length == 16 and lm.prefix_token_id == 258
        assert lm.tok_encode('ab') == [*start, 97, 98] and lm.tok_encode('ab', add_special_tokens=False) == [97, 98]
        made = lm.loglikelihood([asked('ab', 'c'), asked('', 'c')], True)
        for (value, _), ids in zip(made, ([*start, 97, 98], [258]), strict=True):
            logits, _ = model.apply({'params': params}, np.array([ids]))
            assert value == pytest.approx(float(jax.nn.log_softmax(logits[0, -1])[99]), rel=1e-5)

    def test_of_a_folder_are_those_of_its_tokenizer(self, folders):
        for name in folders:
            lm = harness.Harness(weights.load(folders[name]), 1, mesh=on('1'))
            theirs = transformers.AutoTokenizer.from_pretrained(folders[name])
            bos = theirs.bos_token_id
            for text in ('badu gi', ' 17, x', '\n'):
                ids = lm.tok_encode(text)
                assert ids == theirs.encode(text) and ids.count(bos) == (name == 'bos')
            assert (lm.prefix_token_id, lm.eot_token_id, lm.max_length) == (bos, theirs.eos_token_id, 128)

    @pytest.mark.parametrize('name', ['llama', 't5'])
    def test_of_a_sentencepiece_model(self, found, tmp_path, name):
        (tmp_path / 'tokenizer.model').write_bytes(vocabularies.content(name))
        (tmp_path / 'config.json').write_text('{"max_position_embeddings": 64}')
        lm = harness.Harness(weights.Weights(found.model, found.params, str(tmp_path)), 1, mesh=on('1'))
        start = [lm.prefix_token_id] if name == 'llama' else []
        assert lm.tok_encode('badu gi') == start + lm.tok_encode('badu gi', add_special_tokens=False)
        assert (lm.prefix_token_id == lm.eot_token_id) == (name == 't5') and lm.max_length == 64

    def test_tokenizers_that_do_not_fit(self, found, folders, tmp_path):
        with pytest.raises(UsageError, match=f'{tmp_path} holds no tokenizer'):
            harness.Harness(weights.Weights(found.model, found.params, str(tmp_path)), 1)
        small = found.model.clone(config=configs.Model(vocab_size=V - 1))
        with pytest.raises(UsageError, match=f'has {V} ids, more than the {V - 1} of the network'):
            harness.Harness(weights.Weights(small, found.params, str(folders['plain'])), 1)


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
    """A folder of tasks over 20 questions as in ARC: choices, texts as a whole, generation."""
    folder, rng, lines = tmp_path_factory.mktemp('tasks'), random.Random(2), iter(vocabularies.prose(120, seed=11))
    with (folder / 'questions.jsonl').open('w') as file:
        for number in range(20):
            options = [' '.join(rng.choices(vocabularies.words(), k=rng.randint(1, 5))) for _ in range(4)]
            question = {'id': f'q{number}', 'question': ' '.join(next(lines) for _ in range(rng.randint(1, 6)))}
            labels = ['A', 'B', 'C', 'D'] if number % 5 else ['1', '2', '3', '4']
            choices = {'choices': {'text': options, 'label': labels}, 'answerKey': rng.choice(labels)}
            file.write(json.dumps(question | choices) + '\n')
    common = {
        'dataset_path': 'json', 'test_split': 'test',
        'dataset_kwargs': {'data_files': {'test': f'{folder}/questions.jsonl'}, 'cache_dir': f'{folder}/cache'},
    }  # fmt: skip
    mean = {'aggregation': 'mean', 'higher_is_better': True}
    arc = {
        'task': 'local_arc',
        'output_type': 'multiple_choice',
        'doc_to_text': 'Question: {{question}}\nAnswer:',
        'doc_to_target': '{{choices.label.index(answerKey)}}',
        'doc_to_choice': '{{choices.text}}',
        'metric_list': [
            {'metric': name, 'aggregation': 'mean', 'higher_is_better': True} for name in ('acc', 'acc_norm')
        ],
    }
    rolling = {
        'task': 'local_text',
        'output_type': 'loglikelihood_rolling',
        'doc_to_text': '',
        'doc_to_target': '{{question}}',
        'metric_list': [{'metric': 'byte_perplexity'}, {'metric': 'bits_per_byte'}],
    }
    written = {
        'task': 'local_written',
        'output_type': 'generate_until',
        'doc_to_text': '{{choices.text[0]}}',
        'doc_to_target': '{{choices.text[1]}}',
        'generation_kwargs': {'until': ['d'], 'max_gen_toks': 10, 'do_sample': False},
        'metric_list': [{'metric': 'exact_match'} | mean],
    }
    names = arc | {'task': 'local_names', 'doc_to_choice': "{{['A', 'B', 'C', 'D', '1', '2', '3', '4']}}"}
    names |= {'doc_to_target': "{{['A', 'B', 'C', 'D', '1', '2', '3', '4'].index(answerKey)}}"}
    missing = arc | {'task': 'local_missing', 'dataset_kwargs': {'data_files': {'test': f'{folder}/missing.jsonl'}}}
    for task in (arc, names, rolling, written, missing):
        (folder / f'{task["task"]}.yaml').write_text(yaml.safe_dump(common | task))
    return folder


def run(lm, tasks, *names):
    return lm_eval.simple_evaluate(lm, tasks=list(names), task_manager=TaskManager(include_path=str(tasks)))


class TestAgainstTransformers:
    @pytest.mark.parametrize('name', ['plain', 'bos'])
    def test_choices(self, folders, tasks, name):
        theirs = run(HFLM(str(folders[name]), device='cpu', dtype='float32', batch_size=4), tasks, 'local_arc')
        ours = run(harness.Harness(weights.load(folders[name]), 4), tasks, 'local_arc')
        of_task = ours['results']['local_arc']
        for metric in ('acc,none', 'acc_norm,none', 'acc_stderr,none'):
            assert of_task[metric] == theirs['results']['local_arc'][metric], metric
        answers = [
            np.array([s['filtered_resps'] for s in sorted(found['samples']['local_arc'], key=lambda s: s['doc_id'])])
            for found in (ours, theirs)
        ]  # log-likelihoods and, as 0 or 1, whether they are greedy
        assert answers[0].shape == (20, 4, 2)
        np.testing.assert_allclose(*answers, rtol=0, atol=1e-4)

    def test_texts_and_generation(self, folders, tasks):
        names = 'local_text', 'local_written'
        theirs = run(HFLM(str(folders['plain']), device='cpu', dtype='float32', batch_size=4), tasks, *names)
        ours = run(harness.Harness(weights.load(folders['plain']), 4), tasks, *names)
        for metric in ('byte_perplexity,none', 'bits_per_byte,none'):
            wanted = theirs['results']['local_text'][metric]
            assert ours['results']['local_text'][metric] == pytest.approx(wanted, rel=1e-5)
        written = [
            [s['filtered_resps'] for s in sorted(found['samples']['local_written'], key=lambda s: s['doc_id'])]
            for found in (ours, theirs)
        ]
        assert written[0] == written[1] and any(text for [text] in written[0])

    def test_a_bos_is_no_part_of_a_text(self, folders, tasks, logits):
        """Rolling: as theirs where it adds no bos. Else theirs puts two before a text and counts the second as text."""
        texts = [asked(text) for text in ('badu gi', ' '.join(vocabularies.prose(3, seed=4)))]
        lm = harness.Harness(weights.load(folders['bos']), 4)
        ours, bos = lm.loglikelihood_rolling(texts, True), lm.prefix_token_id
        theirs = [HFLM(str(folders['bos']), device='cpu', dtype='float32', add_bos_token=add) for add in (False, None)]
        one, two = (np.array(model.loglikelihood_rolling(texts, True)) for model in theirs)
        np.testing.assert_allclose(ours, one, rtol=1e-5)
        for text, of_one, of_two in zip(texts, one, two, strict=True):
            ids = lm.tok_encode(*text.args, add_special_tokens=False)
            assert len(ids) < 127
            for start, value in (([bos], of_one), ([bos, bos], of_two)):
                counted = range(1, len(start) + len(ids))
                assert value == pytest.approx(sum_of(logits, start + ids, counted, 128)[0], rel=1e-5)
        assert (two < one - 1).all()

    def test_the_drop_of_tasks(self, folders, tasks, tmp_path, capsys):
        """As theirs of networks whose layers are cut out; with a share of the documents, and blanks in lists."""
        text = tmp_path / 'text.jsonl'
        text.write_text(''.join(json.dumps({'text': line}) + '\n' for line in vocabularies.prose(9)))
        words = ['--checkpoint', folders['plain'], '--text', text, '--out', tmp_path / 'out', '--tokens', '1e2']
        words += ['--tasks', ' local_arc, local_written', '--task_path', tasks, '--limit', 0.5, '--batch_size', 4]
        assert drop.main([str(word) for word in words]) == 0
        found = json.loads((tmp_path / 'out/result.json').read_text())['results'][0]['metrics']
        tokenizer, values = transformers.AutoTokenizer.from_pretrained(folders['plain']), []
        for removed in (None, 0, 1, 2):
            model = transformers.LlamaForCausalLM.from_pretrained(folders['plain'], dtype=torch.float32)
            if removed is not None:
                del model.model.layers[removed]
                model.config.num_hidden_layers = 2
                for number, layer in enumerate(model.model.layers):
                    layer.self_attn.layer_idx = number
            manager = TaskManager(include_path=str(tasks))
            made = lm_eval.simple_evaluate(
                HFLM(model, tokenizer=tokenizer, batch_size=4), tasks=['local_arc'], task_manager=manager, limit=10
            )
            values.append([made['results']['local_arc'][f'{metric},none'] for metric in ('acc', 'acc_norm')])
        whole, *without = np.array(values)
        for at, metric in enumerate(('acc', 'acc_norm')):
            of_metric = found[f'local_arc/{metric}']
            assert of_metric['value'] == whole[at]
            np.testing.assert_allclose(
                of_metric['drop']['1']['mean'], [of[at] - whole[at] for of in without], atol=1e-12
            )
        assert (np.array(without) != whole).any() and 'local_written/exact_match' in found


def test_documents_are_in_the_order_of_the_task():
    samples = [
        {'doc_id': number, 'filter': name, 'metrics': ['acc', 'words'], 'acc': value, 'words': (value, 3)}
        for name, number, value in (('none', 2, 0), ('none', 0, 1), ('best', 0, True), ('none', 1, 0.5))
    ]
    assert harness.of_documents(samples) == {'acc,none': [1, 0.5, 0], 'acc,best': [1]}


class TestCommand:
    def test_a_share_of_the_documents(self, folders, tasks, tmp_path):
        for limit, count in (('0.3', 6), ('1.2e1', 12)):
            words = ['--checkpoint', folders['plain'], '--tasks', 'local_arc, local_text', '--task_path', tasks]
            words += ['--limit', limit, '--out', tmp_path / 'out.json', '--num_fewshot', 0]
            assert evaluate.main([str(word) for word in words]) == 0
            found = json.loads((tmp_path / 'out.json').read_text())
            assert found['limit'] == float(limit)
            assert {of_task['effective'] for of_task in found['n-samples'].values()} == {count}

    def test_the_table(self, folders, tasks, tmp_path, capsys):
        words = ['--checkpoint', folders['plain'], '--tasks', 'local_arc,local_text', '--task_path', tasks]
        words += ['--limit', 12, '--num_fewshot', 1, '--batch_size', 8, '--out', tmp_path / 'out.json']
        assert evaluate.main([str(word) for word in words]) == 0
        shown, found = capsys.readouterr().out, json.loads((tmp_path / 'out.json').read_text())
        of_task = found['results']['local_arc']
        assert 0 <= of_task['acc,none'] <= 1 and of_task['acc_stderr,none'] > 0 and found['n-shot']['local_arc'] == 1
        assert found['n-samples']['local_arc']['effective'] == 12 and found['checkpoint'] == str(folders['plain'])
        assert found['results']['local_text']['bits_per_byte,none'] > 0
        documents = found['documents']['local_arc']
        assert len(documents['acc,none']) == 12 and set(documents['acc,none']) <= {0, 1}
        for metric in ('acc,none', 'acc_norm,none'):
            assert np.mean(documents[metric]) == pytest.approx(of_task[metric])
        assert not found['documents']['local_text']  # sums over texts of different lengths
        assert f'|{of_task["acc,none"]:.4f}|' in shown.replace(' ', '') and 'acc_norm' in shown

    def test_the_average(self, folders, tasks, tmp_path, capsys):
        """Of two tasks with accuracies, and its standard error for independent tasks; none with one that has none."""
        words = ['--checkpoint', folders['plain'], '--task_path', tasks, '--num_fewshot', 0]
        words = [*map(str, words), '--out', str(out := tmp_path / 'out.json'), '--tasks']
        assert evaluate.main([*words, 'local_arc,local_names']) == 0
        shown, found = capsys.readouterr().out, json.loads(out.read_text())
        one, other = (found['results'][name] for name in ('local_arc', 'local_names'))
        average = (one['acc,none'] + other['acc,none']) / 2
        variance = (one['acc_stderr,none'] ** 2 + other['acc_stderr,none'] ** 2) / 4
        assert one['acc,none'] != other['acc,none'] and min(one['acc_stderr,none'], other['acc_stderr,none']) > 0
        assert found['average'] == pytest.approx(average, rel=1e-12)
        assert found['average_stderr'] == pytest.approx(variance**0.5, rel=1e-12)
        assert f'average acc of 2 tasks: {100 * average:.2f} ± {100 * variance**0.5:.2f} %\n' in shown
        assert evaluate.main([*words, 'local_arc,local_text']) == 0
        assert 'average' not in capsys.readouterr().out + out.read_text()

    @pytest.mark.parametrize(
        'checkpoint, task, code, message',
        [
            ('plain', 'local_ark', 2, "unknown task 'local_ark', did you mean local_arc?"),
            ('plain', 'local_missing', 4, 'task local_missing cannot be loaded: '),
            ('none', 'local_arc', 2, 'holds no tokenizer (tokenizer.json or tokenizer.model)'),
        ],
    )
    def test_bad_input_is_one_line(self, folders, tasks, tmp_path, capsys, checkpoint, task, code, message):
        folder = folders['plain']
        if checkpoint == 'none':
            for name in ('config.json', 'model.safetensors'):
                (tmp_path / name).write_bytes((folder / name).read_bytes())
            folder = tmp_path
        words = ['--checkpoint', folder, '--tasks', task, '--task_path', tasks, '--num_fewshot', 0]
        assert evaluate.main([str(word) for word in words]) == code
        said = capsys.readouterr().err
        assert message in said and said.count('mixln_jax: ') == 1
