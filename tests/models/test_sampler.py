"""Generation over a cache against the whole network without one, and the choice of tokens against numpy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import KINDS, PLACEMENTS, network

from mixln_jax import config as configs
from mixln_jax.distributed import mesh as meshes
from mixln_jax.models import bert, families, sampler, sampling
from mixln_jax.models.sampler import Sampler
from mixln_jax.models.sampling import Sampling
from mixln_jax.system.errors import NumericsError, UsageError

GREEDY = Sampling(temperature=0)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1, 2, 3], list(range(10)) * 4]  # the last is longer than the window
WINDOW = 24
ALL = [*PLACEMENTS, *(f'{name}+prores' for name in ('mix', 'sandwich', 'hybridnorm_star'))]


@functools.cache
def make(norm_position='mix', devices=(1, 1, 1), window=WINDOW, dtype='float32', **changes):
    """Returns (model, params on the devices, Sampler)."""
    mesh = meshes.make_mesh(configs.Mesh(*devices), jax.devices('cpu'))
    model, params = network(norm_position, **changes)
    model = model.clone(compute_dtype=dtype)
    generator = Sampler(model, window, mesh)
    return model, generator.to_devices(params), generator


@functools.partial(jax.jit, static_argnums=0)
def whole(model, params, batch):
    """The logits [B, T, V] of all positions at once."""
    return model.apply({'params': params}, batch)[0]


def decoded(model, params, ids, first):
    """The logits of the positions from `first` on, one after the other over a cache."""
    apply = jax.jit(functools.partial(model.apply, mutable=['intermediates'], method='backbone'))
    (_, _), made = apply({'params': params}, ids[:, :first])
    cache = jax.tree.map(lambda a: jnp.pad(a, [(0, 0)] * 2 + [(0, 9 - first)] + [(0, 0)] * 2), made['intermediates'])
    for place in range(first, ids.shape[1]):
        positions = np.full((len(ids), 1), place)
        seen = np.hstack([np.arange(9) < positions, np.zeros((len(ids), 2), bool)])
        recent = jax.tree.map(lambda a: jnp.ones((*a.shape[:2], 2, *a.shape[3:])), cache)
        batch = {'inputs': ids[:, place : place + 1], 'positions': positions, 'cache_mask': seen}
        (x, _), made = apply({'params': params, 'cache': cache, 'recent': recent}, batch)
        cache = jax.tree.map(lambda old, new: old.at[:, :, place].set(new[:, :, 0]), cache, made['intermediates'])  # noqa: B023
        yield np.asarray(model.apply({'params': params}, x[:, 0], method='logits'))


@pytest.mark.parametrize(
    'norm_position, changes',
    [*((name, {}) for name in ALL), *(('mix', KINDS[kind]) for kind in ('tied', 'all')), ('mix', {'num_kv_heads': 1}),
     ('pre', {'scan_unroll': '1', 'remat': 'full'})],
)  # fmt: skip
def test_logits_over_a_cache_are_those_without(norm_position, changes):
    model, params = network(norm_position, **({'ramp_steps': 10} if '+' in norm_position else {}), **changes)
    model = model.clone(trained_steps=17 if '+' in norm_position else None)
    ids = np.random.default_rng(0).integers(0, 11, (2, 8))
    expected = np.asarray(whole(model, params, ids))
    for place, logits in enumerate(decoded(model, params, ids, 4), 4):
        np.testing.assert_allclose(logits, expected[:, place], rtol=0, atol=1e-5)
    assert np.abs(expected).max() > 0.5


def test_a_document_of_a_packed_row_goes_on_as_alone():
    """Rows of mode pack give each document its own positions, which are those of generation."""
    model, params = network('mix')
    ids = np.random.default_rng(1).integers(0, 11, (2, 13))
    segments = np.repeat([[1] * 5 + [2] * 8], 2, axis=0)
    positions = np.repeat([[*range(5), *range(8)]], 2, axis=0)
    packed = np.asarray(whole(model, params, {'inputs': ids, 'segment_ids': segments, 'positions': positions}))
    for place, logits in enumerate(decoded(model, params, ids[:, 5:], 3), 5 + 3):
        np.testing.assert_allclose(logits, packed[:, place], rtol=0, atol=1e-5)


def check_greedy(model, params, prompts, completions, max_new):
    """Each token is the likeliest after those before it, computed without a cache, and has that log-probability."""
    for prompt, row in zip(prompts, completions, strict=True):
        start = prompt[row.cut :]
        ids = np.array([start + row.ids])
        log_probs = np.asarray(jax.nn.log_softmax(model.apply({'params': params}, ids)[0][0]))[len(start) - 1 : -1]
        assert row.ids == log_probs.argmax(-1).tolist()
        np.testing.assert_allclose(row.log_probs, log_probs.max(-1), rtol=0, atol=1e-5)
        assert row.finish == 'length' and len(row.ids) == min(max_new, WINDOW - len(start))


@pytest.mark.parametrize('devices', [(1, 1, 1), (8, 1, 1), (2, 2, 2)])
def test_greedy_is_the_plain_loop(devices):
    """Prompts of unequal length, one of them cut on the left, and one that the window ends."""
    model, params, generator = make(devices=devices)
    completions = generator.generate(params, PROMPTS, max_new=20, sampling=GREEDY)
    assert [row.cut for row in completions] == [0, 0, 0, 40 - WINDOW // 2]
    check_greedy(model, network('mix')[1], PROMPTS, completions, 20)


@pytest.mark.parametrize('name', ['greedy', 'sampled'])
def test_a_row_alone_is_the_row_of_eight(name):
    """Tokens are the same; log-probabilities to a relative 1e-6: a matrix product of one row sums in another order."""
    chosen = {'greedy': GREEDY, 'sampled': Sampling(1.5, 8, 0.95)}[name]
    _, params, generator = make()
    prompts = [PROMPTS[number % 3] for number in range(8)]
    many = generator.generate(params, prompts, max_new=10, sampling=chosen, seed=3)
    for number in (0, 5, 7):
        [alone] = generator.generate(params, prompts[number : number + 1], rows=[number], max_new=10, sampling=chosen,
                                   seed=3)  # fmt: skip
        assert alone.ids == many[number].ids
        np.testing.assert_allclose(alone.log_probs, many[number].log_probs, rtol=1e-6, atol=0)
    if name == 'sampled':  # equal prompts with other numbers, and other seeds, go on differently
        assert many[0].ids != many[3].ids
        assert generator.generate(params, prompts, max_new=10, sampling=chosen, seed=4)[0].ids != many[0].ids


def test_devices_do_not_change_a_sample():
    chosen = dict(max_new=12, sampling=Sampling(1.2, 9, 0.9), seed=11)
    one, eight = (
        generator.generate(params, PROMPTS, **chosen) for _, params, generator in (make(), make(devices=(8, 1, 1)))
    )
    assert [row.ids for row in one] == [row.ids for row in eight]
    assert max(np.abs(np.subtract(a.log_probs, b.log_probs)).max() for a, b in zip(one, eight, strict=True)) < 1e-5


def test_steps_at_a_time_do_not_change_a_sample():
    _, params, generator = make()
    made = [generator.generate(params, PROMPTS, max_new=9, seed=5, steps=steps) for steps in (1, 4, 100)]
    assert [row.ids for row in made[0]] == [row.ids for row in made[1]] == [row.ids for row in made[2]]


def test_the_cache_of_bfloat16_is_the_whole_network_in_bfloat16():
    model, params, generator = make(dtype='bfloat16')
    for prompt, row in zip(
        PROMPTS[:3], generator.generate(params, PROMPTS[:3], max_new=9, sampling=GREEDY), strict=True
    ):
        logits = np.asarray(whole(model, params, np.array([prompt + row.ids])))[0, len(prompt) - 1 : -1]
        chosen = logits[np.arange(9), row.ids]
        assert (chosen >= logits.max(-1) - 0.1).all()
        log_probs = chosen - np.asarray(jax.nn.logsumexp(logits, axis=-1))
        np.testing.assert_allclose(row.log_probs, log_probs, rtol=0, atol=0.1)


class TestEnds:
    def test_at_each_of_several_end_tokens(self):
        _, params, generator = make()
        free = generator.generate(params, PROMPTS[:3], max_new=16, sampling=GREEDY)
        ends = [free[0].ids[3], free[1].ids[5]]
        for row, whole_row in zip(
            generator.generate(params, PROMPTS[:3], max_new=16, sampling=GREEDY, end_ids=ends), free, strict=True
        ):
            places = [place for place, token in enumerate(whole_row.ids) if token in ends]
            assert row.ids == whole_row.ids[: places[0] + 1 if places else None]
            assert row.finish == ('stop' if places else 'length')

    def test_early_once_all_rows_have_ended(self, monkeypatch):
        _, params, generator = make()
        free = [row.ids for row in generator.generate(params, PROMPTS[:2], max_new=16, seed=1)]
        ends = [max(ids, key=ids.index) for ids in free]  # the token that comes last for the first time
        lengths = [1 + next(place for place, token in enumerate(ids) if token in ends) for ids in free]
        counts, extend = [], sampler._extend

        def counted(*arguments):
            counts.append(int(arguments[-1]))
            return extend(*arguments)

        monkeypatch.setattr(sampler, '_extend', counted)
        made = generator.generate(params, PROMPTS[:2], max_new=16, seed=1, end_ids=ends, steps=100)
        assert [row.ids for row in made] == [ids[:length] for ids, length in zip(free, lengths, strict=True)]
        assert counts == [1, max(lengths) - 1] and 2 < max(lengths) < 16

    def test_where_the_reader_says_so(self):
        _, params, generator = make()
        seen = []
        for rows in generator.stream(params, PROMPTS[:2], max_new=16, sampling=GREEDY, steps=2):
            seen.append([len(row.ids) for row in rows])
            if len(rows[0].ids) == 5:
                rows[0].finish = 'stop'
        assert seen == [[1, 1], [3, 3], [5, 5], *([5, n] for n in (7, 9, 11, 13, 15, 16))]
        assert [row.finish for row in rows] == ['stop', 'length']

    def test_limits_of_each_row(self):
        _, params, generator = make()
        made = generator.generate(params, PROMPTS[:3], max_new=[1, 30, 4])
        assert [len(row.ids) for row in made] == [1, WINDOW - 1, 4] and {row.finish for row in made} == {'length'}


@pytest.mark.parametrize('length, max_new, kept', [(23, 99, 23), (24, 4, 20), (24, 99, 12), (500, 12, 12), (30, 1, 23)])
def test_prompts_that_fill_the_window_lose_their_beginning(length, max_new, kept):
    assert sampler.fit(range(length), max_new, WINDOW) == range(length - kept, length)


def test_lengths_are_few():
    found = [sampler._bucket(length, 1000, 4) for length in range(1, 1001)]
    assert all(length <= made for length, made in enumerate(found, 1)) and len({*found}) < 28
    assert all(made <= max(16, 1.34 * length) for length, made in enumerate(found, 1))
    assert {sampler._bucket(length, 1000, 1) for length in range(1, 1001)} == {16, 32, 64, 128, 256, 512, 1000}


def log_softmax(z):
    return z - z.max(-1, keepdims=True) - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))


def kept_by_numpy(logits, temperature, top_k, top_p):
    """The probabilities of draws of one row in float64, by sorting (Holtzman et al. 2020; Fan et al. 2018)."""
    z = logits.astype(np.float64) / temperature
    order = np.argsort(-z, kind='stable')
    z[order[top_k or len(z) :]] = -np.inf
    p = np.exp(log_softmax(z))
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    'temperature, top_k, top_p',
    [
        (1, 0, 1),
        (0.7, 0, 1),
        (1, 1, 1),
        (1, 5, 1),
        (1, 400, 1),
        (1, 0, 0.9),
        (1, 0, 1e-6),
        (1.3, 40, 0.6),
        (2, 7, 0.9),
    ],
)
def test_top_k_and_top_p_are_numpys(temperature, top_k, top_p):
    logits = np.random.default_rng(2).normal(0, 3, (4, 300)).astype(np.float32)
    found = np.asarray(sampling.probabilities(jnp.asarray(logits), Sampling(temperature, top_k, top_p)))
    expected = np.array([kept_by_numpy(row, temperature, top_k, top_p) for row in logits])
    assert ((found > 0) == (expected > 0)).all()
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-9)


def test_equally_likely_tokens_are_kept_together():
    p = sampling.probabilities(jnp.array([[2.0, 1.0, 1.0, 1.0, 0.0]]), Sampling(top_k=2))
    assert (np.asarray(p) > 0).tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize('chosen, V', [(Sampling(), 12), (Sampling(1.5, 6, 0.9), 12), (Sampling(), 300)])
def test_frequencies_are_the_probabilities(chosen, V):
    """Chi-square over 20,000 draws: below the quantile 0.9999 of its distribution."""
    count, logits = 20_000, np.random.default_rng(3).normal(0, 0.6, V).astype(np.float32)
    draw = jax.jit(functools.partial(sampling.draw, sampling=chosen))
    places = np.arange(count, dtype=np.int32)
    tokens, log_probs = draw(
        jnp.tile(logits, (count, 1)), seed=np.uint32(7), rows=places % 100, positions=places // 100
    )
    expected = count * kept_by_numpy(logits, chosen.temperature, chosen.top_k, chosen.top_p)
    found, there = np.bincount(tokens, minlength=V), expected > 0
    statistic = (np.square(found - expected)[there] / expected[there]).sum()
    freedom = there.sum() - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty 1931
    assert statistic < quantile and not found[~there].any()
    np.testing.assert_allclose(log_probs, log_softmax(logits.astype(np.float64))[tokens], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    'wrong, message',
    [({'temperature': -0.1}, 'temperature=-0.1 must be from 0'), ({'temperature': math.nan}, 'temperature=nan'),
     ({'top_k': -1}, 'top_k=-1 must be at least 0'), ({'top_p': 0.0}, 'top_p=0.0 must be above 0'),
     ({'top_p': 1.1}, 'top_p=1.1'), ({'top_p': math.nan}, 'top_p=nan')],
)  # fmt: skip
def test_options_out_of_range(wrong, message):
    with pytest.raises(UsageError, match=message):
        Sampling(**wrong)


def test_a_prompt_without_tokens_and_weights_that_are_not_finite():
    _, params, generator = make()
    with pytest.raises(UsageError, match='a prompt has no token'):
        generator.generate(params, [[1], []])
    broken = dict(params, norm={'scale': params['norm']['scale'] * math.nan})
    with pytest.raises(NumericsError, match='not finite'):
        generator.generate(broken, [[1]])


def test_a_network_that_sees_both_sides():
    model = families.from_config(configs.Model(family='bert', num_layers=1, norm_position='post'), 'float32')
    assert isinstance(model, bert.Bert)
    with pytest.raises(UsageError, match='sees both sides'):
        Sampler(model, 16)
