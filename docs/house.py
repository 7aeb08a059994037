"""The picture of the package's rooms and the table of its sizes: `python docs/house.py` writes both into develop.md."""

import ast
import itertools
import pathlib
import re
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
# From the ground up. A room, which is a folder or a module of mixln_jax, imports itself and the floors below.
FLOORS = [
    (['system'], 'errors and exit codes, signals, files, the terminal, hardware'),
    (['keys'], 'every key of a run: default, type, range, help'),
    (['config', 'trees'], 'checked configurations; names of leaves in parameter trees'),
    (['recipes', 'distributed', 'data'], 'recipe files; meshes and processes; text as batches of token rows'),
    (['kernels'], 'attention, cross-entropy, matrix products'),
    (['models'], 'placements, the shared stack, LLaMA, BERT, Hugging Face folders'),
    (['tasks'], 'what is learned: losses, scores, the numbers that lines show'),
    (['program'], 'the compiled functions: (state, batch) -> (state, metrics); optimisers'),
    (['runs'], 'work directories, checkpoints, weights, metrics.jsonl'),
    (['evaluation', 'report', 'plan'], 'the evaluation loop and harness; reports and figures; what a run needs'),
    (['analysis'], 'what each layer does'),
    (['training'], 'one job from start to end: loop, hooks, meter'),
    (['sweeps'], 'many runs that differ in a few keys, shared by workers'),
    (['main', 'sweep', 'evaluate', 'export', 'generate', 'replay'], 'commands'),
]
LONG = 60  # lines of a function
# The functions that a reader passes on the way from the command to what it does. Each one names the next.
STEP = ('main.main', 'training.run.run', 'program.program.Program.__init__', 'program.step.train_step')
LOSS = (*STEP, 'program.step._sums_and_gradients', 'program.step._sums', 'tasks.language.Language.losses')
PATHS = {
    'the training loop': ('main.main', 'training.run.run', 'training.run._Job.train', 'training.loop.fit'),
    'the train step': STEP,
    'the loss': (*LOSS, 'kernels.cross_entropy.token_losses'),
    'a block': (
        *LOSS,
        'models.llama.Llama.backbone',
        'models.transformer.Stack.__call__',
        'models.transformer.Layer.__call__',
    ),
}


def picture() -> str:
    """Returns the floors as indented text, the highest first."""
    lines = [(f'{"  ".join(rooms)}', about) for rooms, about in reversed(FLOORS)]
    width = max(len(rooms) for rooms, _ in lines)
    return ''.join(f'    {rooms:<{width}}   {about}\n' for rooms, about in lines)


def modules() -> dict[pathlib.Path, ast.Module]:
    """Returns the syntax tree of every module of the package."""
    return {path: ast.parse(path.read_text(encoding='utf-8')) for path in sorted((ROOT / 'mixln_jax').rglob('*.py'))}


def functions(tree: ast.Module, nested: bool = False) -> list[ast.FunctionDef]:
    """Returns the functions and methods of a module; `nested`: also those inside functions."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found += [one for one in ast.walk(node) if isinstance(one, ast.FunctionDef)] if nested else [node]
        elif isinstance(node, ast.ClassDef):
            found += functions(node, nested)
    return found


def definition(trees: dict[pathlib.Path, ast.Module], name: str) -> tuple[ast.AST, ast.FunctionDef]:
    """Returns the definition at the top of a module that has the function `name` in it, and the function.

    Raises KeyError if there is no such function.
    """
    modules = {
        '.'.join(path.relative_to(ROOT / 'mixln_jax').with_suffix('').parts): tree for path, tree in trees.items()
    }
    module = next(prefix for prefix in modules if name.startswith(f'{prefix}.'))
    nodes: list[ast.AST] = [modules[module]]
    for part in name.removeprefix(f'{module}.').split('.'):
        inside = {node.name: node for node in nodes[-1].body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        nodes.append(inside[part])
    return nodes[1], nodes[-1]


def mentioned(definition: ast.AST) -> set[Any]:
    """Returns all names, attributes and constants in a definition; flax calls methods by their names as texts."""
    kinds = {ast.Name: 'id', ast.Attribute: 'attr', ast.Constant: 'value'}
    return {getattr(node, kinds[type(node)]) for node in ast.walk(definition) if type(node) in kinds}


def paths(trees: dict[pathlib.Path, ast.Module]) -> dict[str, str]:
    """Returns {goal: hops and lines of its path}. Raises ValueError if a function does not name the next one."""
    described = {}
    for goal, names in PATHS.items():
        for name, following in itertools.pairwise(names):
            owner, _ = definition(trees, name)
            *_, parent, word = following.split('.')
            word = parent if word.startswith('__') else word
            said = {
                getattr(node, 'id', getattr(node, 'attr', getattr(node, 'value', None))) for node in ast.walk(owner)
            }
            if word not in said:
                raise ValueError(f'{name} does not name {following}')
        functions = [definition(trees, name)[1] for name in names]
        lines = sum(one.end_lineno - one.lineno + 1 for one in functions)
        described[goal] = f'{len(names) - 1} hops, {lines} lines'
    return described


def sizes() -> str:
    """Returns a table of what makes a code base easy or hard to read."""
    trees = modules()
    lines = {path: len(path.read_text(encoding='utf-8').splitlines()) for path in trees}
    every = [(path, one) for path, tree in trees.items() for one in functions(tree)]
    long = sorted(
        f'{one.name} ({one.end_lineno - one.lineno + 1})' for _, one in every if one.end_lineno - one.lineno >= LONG
    )
    public = [one for _, one in every if not one.name.startswith('_')]
    arguments = [arg for one in public for arg in one.args.posonlyargs + one.args.args + one.args.kwonlyargs]
    arguments = [arg for arg in arguments if arg.arg not in ('self', 'cls')]
    hinted = sum(arg.annotation is not None for arg in arguments)
    top = [path for path in trees if path.parent.name == 'mixln_jax']
    big = sorted(f'{path.relative_to(ROOT / "mixln_jax")} ({n})' for path, n in lines.items() if n > 400)
    rows = {f'from the command to {goal}': path for goal, path in paths(trees).items()}
    rows |= {
        'modules': len(trees),
        'of them at the top level': len(top),
        'lines': f'{sum(lines.values()):,}',
        'modules of more than 400 lines': ', '.join(big) or '-',
        f'functions of more than {LONG} lines': ', '.join(long) or '-',
        'parameters of public functions with type hints': f'{hinted / len(arguments):.0%}',
    }
    return '| | |\n|---|---|\n' + ''.join(f'| {name} | {value} |\n' for name, value in rows.items())


def between(text: str, name: str, content: str) -> str:
    """Returns a page with `content` between its comments `<!-- NAME: begin ... -->` and `<!-- NAME: end -->`."""
    pattern = rf'(<!-- {name}: begin[^>]*-->\n\n?).*?(\n?<!-- {name}: end -->)'
    return re.sub(pattern, lambda match: f'{match[1]}{content}{match[2]}', text, flags=re.DOTALL)


def main() -> None:
    page = ROOT / 'docs/develop.md'
    text = between(page.read_text(encoding='utf-8'), 'rooms', picture())
    page.write_text(between(text, 'sizes', sizes()), encoding='utf-8')


if __name__ == '__main__':
    main()
