"""Writes YAML files of six tasks for the lm-evaluation-harness that read JSON lines on disk, without a network:
`python -m benchmarks.local_tasks --data evals --out tasks`, then `evaluate --task_path tasks --tasks local_piqa`.

`local_NAME` asks as the harness's own NAME does, `asked_NAME` as data in Commonsense170K's format, in the template
`alpaca`, whose answers are "the correct answer is " and a word. The folder of the data has NAME/SPLIT.jsonl.gz, in the
fields in which each task was published.
"""

import argparse
import pathlib
import sys

import yaml

from mixln_jax.system import cli
from mixln_jax.system.errors import DataError

SPLITS = {
    'arc_easy': 'test',
    'boolq': 'validation',
    'hellaswag': 'validation',
    'openbookqa': 'test',
    'piqa': 'validation',
    'winogrande': 'validation',
}
METRICS = 'acc', 'acc_norm'
LABEL = '{{choices.label.index(answerKey)}}'
BLANK = "sentence.split('_', 1)"
LOCAL = {  # what is asked, the right answer, the answers; as in lm_eval 0.4
    'arc_easy': ('Question: {{question}}\nAnswer:', LABEL, '{{choices.text}}'),
    'boolq': ('{{passage}}\nQuestion: {{question}}?\nAnswer:', '{{answer|int}}', ['no', 'yes']),
    'hellaswag': ('{{query}}', '{{label}}', '{{endings}}'),
    'openbookqa': ('{{question_stem}}', LABEL, '{{choices.text}}'),
    'piqa': ('Question: {{goal}}\nAnswer:', '{{label}}', '{{[sol1, sol2]}}'),
    # The sentence up to the blank, with each option in it, is the context; what comes after the blank is scored.
    'winogrande': (
        '{{answer|int - 1}}',
        f'{{{{{BLANK}[1]|trim}}}}',
        f'{{{{[{BLANK}[0] ~ option1, {BLANK}[0] ~ option2]}}}}',
    ),
}
CHOOSE = (
    'Please choose the correct answer to the question: {{%s}}\n\n'
    '{%% for text in choices.text %%}Answer{{loop.index}}: {{text}}{{" " if not loop.last}}{%% endfor %%}\n\n'
    'Answer format: {%% for text in choices.text %%}answer{{loop.index}}{{"/" if not loop.last}}{%% endfor %%}'
)
ANSWERS = "{{['answer1', 'answer2', 'answer3', 'answer4', 'answer5'][:choices.text|length]}}"
ASKED = {
    'arc_easy': (CHOOSE % 'question', LABEL, ANSWERS),
    'boolq': (
        'Please answer the following question with true or false, question: {{question}}?\n\nAnswer format: true/false',
        '{{1 - answer|int}}',
        ['true', 'false'],
    ),
    'openbookqa': (CHOOSE % 'question_stem', LABEL, ANSWERS),
    'piqa': (
        'Please choose the correct solution to the question: {{goal}}\n\nSolution1: {{sol1}}\n\nSolution2: {{sol2}}\n\n'
        'Answer format: solution1/solution2',
        '{{label}}',
        ['solution1', 'solution2'],
    ),
    'winogrande': (
        'Please choose the correct answer to fill in the blank to complete the given sentence: {{sentence}}\n\n'
        'Option1: {{option1}} Option2: {{option2}} Answer format: option1/option2',
        '{{answer|int - 1}}',
        ['option1', 'option2'],
    ),
}
ALPACA = (
    'Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n'
    '### Instruction:\n%s\n\n### Response:\nthe correct answer is'
)


def tasks(data: pathlib.Path) -> dict[str, dict]:
    """Returns {name: the contents of its YAML file}. Raises DataError if a file of the data is missing."""
    written = {}
    for name, split in SPLITS.items():
        path = data.resolve() / name / f'{split}.jsonl.gz'
        if not path.is_file():
            raise DataError(f'{path} is missing: --data needs {name}/{split}.jsonl.gz')
        asked = {f'asked_{name}': (ALPACA % ASKED[name][0], *ASKED[name][1:])} if name in ASKED else {}
        for task, (text, target, choices) in ({f'local_{name}': LOCAL[name]} | asked).items():
            written[task] = {
                'task': task,
                'dataset_path': 'json',
                'dataset_kwargs': {'data_files': {split: str(path)}},
                f'{"test" if split == "test" else "validation"}_split': split,
                'output_type': 'multiple_choice',
                'doc_to_text': text,
                'doc_to_target': target,
                'doc_to_choice': choices,
                'metric_list': [
                    {'metric': metric, 'aggregation': 'mean', 'higher_is_better': True} for metric in METRICS
                ],
            }
    return written


def main(argv):
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog='python -m benchmarks.local_tasks', description=__doc__, allow_abbrev=False)
    parser.add_argument('--data', required=True, type=pathlib.Path, metavar='DIR', help='with NAME/SPLIT.jsonl.gz')
    parser.add_argument('--out', required=True, type=pathlib.Path, metavar='DIR', help='folder for the YAML files')
    parser.add_argument('--traceback', action='store_true', help='show where an error comes from')

    def command():
        options = cli.parse(parser, argv)
        written = tasks(options.data)
        options.out.mkdir(parents=True, exist_ok=True)
        for name, contents in written.items():
            (options.out / f'{name}.yaml').write_text(yaml.safe_dump(contents, sort_keys=False), encoding='utf-8')
        print(f'{len(written)} tasks in {options.out}: {",".join(written)}')

    return cli.call(command, show_traceback='--traceback' in argv)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
