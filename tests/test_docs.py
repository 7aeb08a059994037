"""README and docs: every link, path, module and `--config` key that they name exists, and README stays short."""

import functools
import pathlib
import pkgutil
import re

import pytest

from mixln_jax import config as configs

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md')), *sorted((ROOT / 'benchmarks').glob('*.md'))]
LONGEST = 120  # lines of README
FOLDERS = 'benchmarks|configs|docs|launch|mixln_jax|tests'
LINK = re.compile(r'\]\(([^)\s]+)\)')
# A path that begins with one of our folders, such as configs/llama_{9m,20m}.py:CELL or tests/golden.
PATH = re.compile(rf'(?<![\w./-])((?:{FOLDERS})/[\w./{{}},*-]*[\w}}*/])')
MODULE = re.compile(r'(?<![\w./-])(python -m )?((?:mixln_jax|benchmarks)(?:\.\w+)+\b)(?!\.\$)')  # not a shell's .$job
IMPORT = re.compile(r'^from (mixln_jax[\w.]*) import (.+?)(?:  #.*)?$', re.MULTILINE)


def spelled_out(path):
    """`a_{b,c}.py` as ['a_b.py', 'a_c.py']."""
    if not (braces := re.search(r'{(.*?)}', path)):
        return [path]
    return [
        full
        for word in braces[1].split(',')
        for full in spelled_out(path[: braces.start()] + word + path[braces.end() :])
    ]


@functools.cache
def anchors(page):
    """The names that GitHub gives to the headings of a page."""
    text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r'^#+ (.*)$', text, re.MULTILINE)
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}


def broken_links(text, page):
    """Relative links of `text`, which is that of `page`, whose file or heading does not exist."""
    for link in LINK.findall(text):
        if re.match(r'https?://|mailto:', link):
            continue
        path, _, anchor = link.partition('#')
        target = (page.parent / path) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


def broken_paths(text):
    """Paths under our folders that nothing in the repository matches."""
    for named in PATH.findall(text):
        for path in spelled_out(named):
            if not (any(ROOT.glob(path)) if '*' in path else (ROOT / path).exists()):
                yield path


def broken_modules(text):
    """Modules and attributes that cannot be imported, and modules that `python -m` cannot run."""
    for command, name in MODULE.findall(text):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            yield name
            continue
        file = ROOT / name.replace('.', '/')
        if command and not (file.with_suffix('.py').exists() or (file / '__main__.py').exists()):
            yield f'python -m {name}'
    for module, names in IMPORT.findall(text):
        for name in names.split(', '):
            try:
                pkgutil.resolve_name(f'{module}.{name}')
            except (ImportError, AttributeError):
                yield f'{module}.{name}'


def broken_keys(text):
    """Keys after `--config.` that a recipe does not have."""
    known = configs.flatten(configs.Config())
    return [key for key in re.findall(r'--config\.([a-z]\w*(?:\.\w+)*)', text) if key not in known]


def broken(text, page):
    """Whatever `text` names and does not exist."""
    return [*broken_links(text, page), *broken_paths(text), *broken_modules(text), *broken_keys(text)]


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page):
    assert broken(page.read_text(), page) == []


@pytest.mark.parametrize('folder', ['configs', 'launch', 'benchmarks', 'mixln_jax'])
def test_what_a_file_names_exists(folder):
    """In recipes, scripts and modules: `--config` keys and, where they are for users alone, paths."""
    files = [file for file in sorted((ROOT / folder).rglob('*')) if file.suffix in ('.py', '.sh', '.sbatch', '.ipynb')]
    assert files
    problems = {
        str(file.relative_to(ROOT)): [*broken_keys(text), *(broken_paths(text) if folder == 'configs' else [])]
        for file in files
        for text in [file.read_text()]
    }
    assert {name: missing for name, missing in problems.items() if missing} == {}


def test_readme_leads_to_every_page():
    text = (ROOT / 'README.md').read_text()
    linked = {(ROOT / link.partition('#')[0]).resolve() for link in LINK.findall(text) if '://' not in link}
    assert linked >= {*PAGES} - {ROOT / 'README.md'}


def test_readme_is_short():
    lines = (ROOT / 'README.md').read_text().splitlines()
    assert len(lines) <= LONGEST, f'README.md has {len(lines)} lines; move some to docs/'


@pytest.mark.parametrize(
    'text, missing',
    [
        ('see [train](docs/trains.md)', ['docs/trains.md'] * 2),
        ('see [train](docs/train.md#no-such-heading)', ['docs/train.md#no-such-heading']),
        ('see [here](#no-such-heading)', ['#no-such-heading']),
        ('`configs/llama_{9m,8m}.py`', ['configs/llama_8m.py']),
        ('`configs/papers/lns_table1.py:CELL`', ['configs/papers/lns_table1.py']),
        ('`tests/*.rs`', ['tests/*.rs']),
        ('run `python -m mixln_jax.reports runs/*`', ['mixln_jax.reports']),
        ('run `python -m mixln_jax.main.run`', ['python -m mixln_jax.main.run']),
        ('call `mixln_jax.main.runs(config)`', ['mixln_jax.main.runs']),
        ('--config.model.norm_positions=pre --config.seed=1', ['model.norm_positions']),
        ('from mixln_jax.models import hf, hugging', ['mixln_jax.models.hugging']),
        ('[a](README.md#start) [b](https://x.y/docs/z.md) `configs/llama_{9m,20m}.py:CELL` `mixln_jax.main.run`', []),
    ],
)
def test_a_broken_one_is_found(text, missing):
    assert broken(text, ROOT / 'README.md') == missing
