"""The tasks of benchmarks/local_tasks.py: asked as the harness's own, and in the words of Commonsense170K's format."""

import gzip
import importlib.util
import json
import pathlib

import jinja2
import pytest
import yaml
from lm_eval.tasks import TaskManager

from benchmarks import local_tasks

ARC = {
    'question': 'What is wet?',
    'choices': {'text': ['fire', 'rain', 'dust'], 'label': ['A', 'B', 'C']},
    'answerKey': 'B',
}
BLANK = 'Ann met Bea since _ had snake_oil.'
DOCUMENTS = {
    'arc_easy': ARC,
    'boolq': {'question': 'is rain wet', 'passage': 'Rain is water.', 'answer': True},
    'hellaswag': {'query': 'Rain: it falls. it', 'endings': ['burns.', 'is wet.', "isn't.", '"dry"'], 'label': 1},
    'openbookqa': {'question_stem': 'Wet is'} | {key: ARC[key] for key in ('choices', 'answerKey')},
    'piqa': {'goal': 'Get wet', 'sol1': 'Stay in', 'sol2': 'Go "out"', 'label': 1},
    'winogrande': {
        'sentence': BLANK,
        'option1': 'Ann',
        'option2': "O'Bea",
        'answer': '2',
    },
}
HEAD = (
    'Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n'
    '### Instruction:\n'
)
TAIL = '\n\n### Response:\nthe correct answer is'
CHOOSE = 'Please choose the correct answer to the question: '
THREE = '\n\nAnswer1: fire Answer2: rain Answer3: dust\n\nAnswer format: answer1/answer2/answer3'
WORDS = {  # context, answers, the right one
    'local_arc_easy': ('Question: What is wet?\nAnswer:', ['fire', 'rain', 'dust'], 1),
    'local_boolq': ('Rain is water.\nQuestion: is rain wet?\nAnswer:', ['no', 'yes'], 1),
    'local_hellaswag': ('Rain: it falls. it', ['burns.', 'is wet.', "isn't.", '"dry"'], 1),
    'local_openbookqa': ('Wet is', ['fire', 'rain', 'dust'], 1),
    'local_piqa': ('Question: Get wet\nAnswer:', ['Stay in', 'Go "out"'], 1),
    'asked_arc_easy': (HEAD + CHOOSE + 'What is wet?' + THREE + TAIL, ['answer1', 'answer2', 'answer3'], 1),
    'asked_boolq': (
        f'{HEAD}Please answer the following question with true or false, question: is rain wet?\n\n'
        f'Answer format: true/false{TAIL}',
        ['true', 'false'],
        0,
    ),
    'asked_openbookqa': (HEAD + CHOOSE + 'Wet is' + THREE + TAIL, ['answer1', 'answer2', 'answer3'], 1),
    'asked_piqa': (
        f'{HEAD}Please choose the correct solution to the question: Get wet\n\nSolution1: Stay in\n\n'
        f'Solution2: Go "out"\n\nAnswer format: solution1/solution2{TAIL}',
        ['solution1', 'solution2'],
        1,
    ),
    'asked_winogrande': (
        f'{HEAD}Please choose the correct answer to fill in the blank to complete the given sentence: '
        f"{BLANK}\n\nOption1: Ann Option2: O'Bea Answer format: option1/option2{TAIL}",
        ['option1', 'option2'],
        1,
    ),
}


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """The harness's tasks {name: task}, each with one document, from the files that the command has written."""
    folder = tmp_path_factory.mktemp('local')
    for name, split in local_tasks.SPLITS.items():
        (folder / name).mkdir()
        with gzip.open(folder / name / f'{split}.jsonl.gz', 'wt') as file:
            file.write(json.dumps(DOCUMENTS[name]) + '\n')
    assert local_tasks.main(['--data', str(folder), '--out', str(folder / 'tasks')]) == 0
    for path in (folder / 'tasks').iterdir():
        task = yaml.safe_load(path.read_text())
        task['dataset_kwargs']['cache_dir'] = str(folder / 'cache')
        path.write_text(yaml.safe_dump(task))
    manager = TaskManager(include_path=str(folder / 'tasks'))
    return {name: manager.load(name)['tasks'][name] for name in [*WORDS, 'local_winogrande']}


@pytest.mark.parametrize('name', WORDS)
def test_words(written, name):
    task = written[name]
    task.build_all_requests()
    context, answers, right = WORDS[name]
    assert [one.args for one in task.instances] == [(context, f' {answer}') for answer in answers]
    assert task.doc_to_target(task.instances[0].doc) == right


def test_the_blank_is_part_of_the_context(written):
    task = written['local_winogrande']
    task.build_all_requests()
    contexts = ['Ann met Bea since Ann', "Ann met Bea since O'Bea"]
    assert [one.args for one in task.instances] == [(context, ' had snake_oil.') for context in contexts]
    for favourite in (0, 1):
        answers = [(float(number == favourite), False) for number in (0, 1)]
        assert task.process_results(task.instances[0].doc, answers)['acc'] == favourite


@pytest.mark.parametrize('name, file', [(n, f) for n, f in {
    'arc_easy': 'arc/arc_easy', 'boolq': 'super_glue/boolq/default', 'openbookqa': 'openbookqa/openbookqa',
    'piqa': 'piqa/piqa',
}.items()])  # fmt: skip
def test_as_the_harness_asks(written, name, file):
    folder = pathlib.Path(importlib.util.find_spec('lm_eval').origin).parent / 'tasks'
    theirs, task = yaml.safe_load((folder / f'{file}.yaml').read_text()), written[f'local_{name}']
    fields = DOCUMENTS[name]
    text = theirs['doc_to_text']
    assert task.doc_to_text(fields) == (fields[text] if text in fields else jinja2.Template(text).render(fields))


def test_a_missing_file(tmp_path, capsys):
    assert local_tasks.main(['--data', str(tmp_path), '--out', str(tmp_path / 'tasks')]) == 4
    assert 'needs arc_easy/test.jsonl.gz' in capsys.readouterr().err and not (tmp_path / 'tasks').exists()
