"""The signs of a coming collapse in runs: what they are, that they change nothing, and the checkpoint from before."""

import contextlib
import pathlib

import numpy as np
import orbax.checkpoint as ocp
import pytest
from corpora import write
from short_runs import WORDS, StopAtTwo, lines_of, recipe

from mixln_jax import main, trees
from mixln_jax.analysis import stability
from mixln_jax.system.errors import NumericsError, Stopped
from mixln_jax.tasks.language import Language
from mixln_jax.training.collapse import Collapse

CHANGES = {
    'model.norm_position': 'post,pre,pre', 'optim.clip_norm': 0.5, 'checkpoint.every': 1, 'checkpoint.keep': 9,
    'eval.every': 0, 'stability.every': 2, 'optim.rate_factors': 'post=0.5',
}  # fmt: skip
OFTEN = ['attention_logits', 'log_z']  # of every second step


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Runs of four steps with signs, without, and stopped in step 2 and run again."""
    folder = tmp_path_factory.mktemp('runs')
    rng = np.random.default_rng(0)
    corpus = write(folder / 'c4-train.json.gz', [' '.join(rng.choice(WORDS, 12)) for _ in range(120)])
    main.run(recipe(corpus, **CHANGES), folder / 'with')
    main.run(recipe(corpus, **CHANGES | {'stability.every': 0}), folder / 'without')
    with pytest.raises(Stopped):
        main.run(recipe(corpus, **CHANGES), folder / 'stopped', stop=StopAtTwo())
    main.run(recipe(corpus, **CHANGES), folder / 'stopped')
    return folder


def state_of(run: pathlib.Path, step: int):
    return ocp.StandardCheckpointer().restore(run / 'checkpoints' / str(step) / 'state')


def signs_of(line):
    return {name.partition('/')[2]: value for name, value in line.items() if name.startswith('stability/')}


def test_they_change_nothing(runs):
    """Losses and weights are the same bits."""
    lines = lines_of(runs / 'without')
    assert not any(map(signs_of, lines))
    with_them = lines_of(runs / 'with')
    assert [{n: v for n, v in line.items() if not n.startswith('stability/')} for line in with_them] == lines
    for step in (1, 4):
        one, other = (dict(trees.named_leaves(state_of(runs / name, step))) for name in ('with', 'without'))
        for name, leaf in one.items():
            np.testing.assert_array_equal(leaf, other[name], err_msg=name)


def test_a_run_that_continues_has_the_same_lines(runs):
    assert lines_of(runs / 'stopped') == lines_of(runs / 'with')


def test_values(runs):
    """Against the weights of two checkpoints, and the norms and losses of the lines, in float64."""
    lines = lines_of(runs / 'with')
    assert [sorted(name for name in OFTEN if name in signs_of(line)) for line in lines] == [[], OFTEN, [], OFTEN]
    squares = lambda tree: sum(np.square(np.float64(leaf)).sum((*range(1, leaf.ndim),)) for leaf in tree)  # noqa: E731
    segments = [f'segment_{number}' for number in range(2)]
    for before, line in zip(lines, lines[1:], strict=False):
        signs, norms = signs_of(line), np.array(line['layers/grad_norm'])
        old, new = (state_of(runs / 'with', one['step'])['params']['layers'] for one in (before, line))
        pairs = [
            [list(dict(trees.named_leaves(tree[segment])).values()) for tree in (old, new)] for segment in segments
        ]
        moved = np.concatenate([squares([b - a for a, b in zip(*pair, strict=True)]) for pair in pairs])
        weights = np.concatenate([squares(pair[0]) for pair in pairs])
        np.testing.assert_allclose(signs['update_ratio'], np.sqrt(moved / weights), rtol=1e-3)  # differences of float32
        assert signs['grad_ratio'] == pytest.approx(norms[0] / norms[2], rel=1e-6)
        sizes = np.array([sum(leaf[0].size for leaf in pair[0]) for pair in (pairs[0], pairs[1], pairs[1])])
        clip = min(1, 0.5 / line['train/grad_norm'])
        assert clip < 1
        np.testing.assert_allclose(signs['grad_to_eps'], norms * clip / np.sqrt(sizes) / 1e-8, rtol=1e-6)
        assert signs['spike_score'] is None and signs['grad_spike_score'] is None and signs['grad_growth'] is None
    losses = [line['train/loss'] for line in lines]
    entropy = losses[0] / (1 - signs_of(lines[0])['entropy_distance'])
    assert 2 < entropy < 3.5  # of letters
    assert signs['entropy_distance'] == pytest.approx(1 - np.mean(losses) / entropy)


@pytest.mark.parametrize('placement', ['post,pre,pre', 'pre,post,post'])
def test_growth_of_the_gradient_of_a_first_layer_that_is_post(runs, monkeypatch, placement):
    monkeypatch.setattr(stability, 'FEWEST_LINES', 2)
    run = runs / placement
    changes = CHANGES | {'checkpoint.every': 0, 'model.norm_position': placement}
    main.run(recipe(next(runs.glob('*.gz')), **changes), run)
    ratios, growths = ([signs_of(line)[name] for line in lines_of(run)] for name in ('grad_ratio', 'grad_growth'))
    expected = [None, None] + [ratios[number] / max(1, np.median(ratios[:number])) for number in (2, 3)]
    assert growths == (expected if placement.startswith('post') else [None] * 4)


def test_one_warning(runs, monkeypatch, capsys):
    """Which the lines of the run give again; a run that goes on does not repeat it."""
    every = stability.Rule(lambda *_: True, 'a ratio of {:.2g}')
    monkeypatch.setattr(stability, 'RULES', {'stability/grad_ratio': every})
    monkeypatch.setattr(stability.Watch, 'FIRST', 0)
    monkeypatch.setattr(stability.Watch, 'LINES', 1)
    corpus = next(runs.glob('*.gz'))
    changes = CHANGES | {'checkpoint.every': 0}
    with contextlib.suppress(Stopped):
        main.run(recipe(corpus, **changes), runs / 'warned', stop=StopAtTwo())
    main.run(recipe(corpus, **changes), runs / 'warned')
    warned = stability.coming_collapse(lines_of(runs / 'warned'))
    assert warned.step == 1
    said = f'mixln_jax: warning: step 1: the network may collapse: {warned.reason}; a lower learning rate'
    assert capsys.readouterr().err.count(said) == 1


def test_the_checkpoint_from_before_stays(runs, monkeypatch):
    """A network that learns nothing stays at ln 259; its losses are said to have been lower at step 4."""
    monkeypatch.setattr(Language, 'baseline', lambda *_: np.log(259))
    monkeypatch.setattr(Collapse, 'WINDOW', 12)
    monkeypatch.setattr(stability.Spikes, 'mean', lambda self, count: 1.0 if len(self.window) == 4 else 5.0)
    changes = {'optim.learning_rate': 1e-9, 'num_steps': 20, 'checkpoint.every': 2, 'checkpoint.keep': 2}
    corpus, run = next(runs.glob('*.gz')), runs / 'collapsed'
    changes = CHANGES | changes | {'collapse': 'stop', 'stability.every': 0}
    with contextlib.suppress(Stopped):
        main.run(recipe(corpus, **changes), run, stop=StopAtTwo())
    with pytest.raises(NumericsError, match='step 14: .*has collapsed.*; checkpoint 4 is from before the collapse'):
        main.run(recipe(corpus, **changes), run)
    assert sorted(int(path.name) for path in (run / 'checkpoints').glob('[0-9]*')) == [4, 10, 12]


def test_what_counts_as_before():
    def ended(losses, checkpoints):
        seen = Collapse('stop', 0, lambda: 7.0)
        for step in range(1, 401):
            if step in checkpoints:
                seen.keep(step, losses(step))
            seen.add(step, losses(step))

    fallen = lambda step: 3.0 if step < 150 else 6.9  # noqa: E731
    with pytest.raises(NumericsError, match='checkpoint 100 is from before'):
        ended(fallen, (50, 100, 200, 300))
    with pytest.raises(NumericsError, match='no checkpoint is from before'):
        ended(fallen, (200, 300))
    with pytest.raises(NumericsError, match='no checkpoint is from before'):
        ended(fallen, ())
    assert Collapse('warn', 0, lambda: 7.0).keep(3, 1.0) is None
    again = Collapse('stop', 10, lambda: 7.0, step=250, losses=[6.9] * 250, record={'sound': [40, 3.0]})
    for step in range(251, 410):
        again.add(step, 6.9)
    with pytest.raises(NumericsError, match='step 410: .*checkpoint 40 is from before'):  # as without the pause
        again.add(410, 6.9)
