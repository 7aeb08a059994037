"""No key is ignored: of every key a result that it changes, here or in the test that is named for it."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import unittest.mock

import jax
import numpy as np
import pytest
import reference
from builders import batch_of, to_jax
from corpora import texts, write

from mixln_jax import config as configs
from mixln_jax import main, trees
from mixln_jax.analysis import during
from mixln_jax.data import batches
from mixln_jax.data import rows as data_rows
from mixln_jax.distributed import mesh as meshes
from mixln_jax.distributed import processes
from mixln_jax.program.program import Program
from mixln_jax.system.errors import UsageError
from mixln_jax.training import hooks, loop, run

DEFAULTS = configs.flatten(configs.Config())
SIZES = {'V': 11, 'D': 8, 'H': 2, 'K': 2, 'F': 12}
SMALL = {
    'batch_size': 8, 'seq_length': 6, 'compute_dtype': 'float32', 'device': 'cpu', 'mesh.data': 1,
    'model.vocab_size': 11, 'model.hidden_size': 8, 'model.intermediate_size': 12, 'model.num_layers': 2,
    'model.num_heads': 2, 'model.norm_position': 'post,pre', 'model.scan_unroll': '1',
}  # fmt: skip
# Runs of two updates that equal the reference's; CHANGES has what makes each another.
RUNS = {
    'cosine': {
        'num_steps': 4, 'accumulate': 2, 'model.norm_eps': 0.1, 'model.rope_theta': 2.0, 'optim.name': 'adamw',
        'optim.schedule': 'cosine', 'optim.learning_rate': 0.02, 'optim.warmup_ratio': 0.25, 'optim.min_ratio': 0.5,
        'optim.weight_decay': 0.3, 'optim.b1': 0.6, 'optim.b2': 0.7, 'optim.eps': 1e-3, 'optim.clip_norm': 0.5,
    },
    'linear': {
        'num_steps': 4, 'optim.name': 'galore', 'optim.schedule': 'linear', 'optim.learning_rate': 0.02,
        'optim.warmup_ratio': 0.25, 'optim.min_ratio': 0.5, 'optim.eps': 1e-3, 'optim.galore_rank': 3,
        'optim.galore_gap': 1, 'optim.galore_scale': 0.7,
    },
    'wsd': {
        'num_steps': 3, 'model.norm_position': 'post,group_pre', 'model.norm_groups': 2, 'optim.schedule': 'wsd',
        'optim.learning_rate': 0.02, 'optim.decay_ratio': 0.7, 'optim.min_ratio': 0.5, 'optim.eps': 1e-3,
    },
}  # fmt: skip
# (run, key, another value: its default, or what stands here; None: another test's)
OTHERS = {'accumulate': None, 'model.norm_position': None, 'optim.name': None, 'optim.schedule': None}
OTHERS = DEFAULTS | {'optim.galore_rank': 2} | OTHERS
CHANGES = [(run, key, OTHERS[key]) for run, keys in RUNS.items() for key in keys if OTHERS[key] is not None]
CHANGES.append(('cosine', 'model.num_heads', 4))
# Keys that change the names, shapes or types of the train state.
STATES = {
    'model.vocab_size': 200, 'model.hidden_size': 16, 'model.intermediate_size': 16, 'model.num_layers': 3,
    'model.num_kv_heads': 1, 'model.norm_position': 'pre', 'model.post_ratio': 1.0, 'param_dtype': 'bfloat16',
    'optim.name': 'sgd', 'optim.mu_dtype': 'bfloat16', 'model.head_dim': 8, 'model.attention_bias': True,
    'model.mlp_bias': True, 'model.tie_word_embeddings': True,
}  # fmt: skip
ELSEWHERE = {
    'seed': 'test_keys.py::test_what_a_run_begins_with',
    'data.seed': 'test_keys.py::test_what_a_run_begins_with',
    'batch_size': 'test_keys.py::test_when_a_run_does_what',
    'seq_length': 'test_keys.py::test_when_a_run_does_what',
    'log_every': 'test_keys.py::test_when_a_run_does_what',
    'eval.every': 'test_keys.py::test_when_a_run_does_what',
    'eval.tokens': 'test_keys.py::test_when_a_run_does_what',
    'checkpoint.every': 'test_keys.py::test_when_a_run_does_what',
    'checkpoint.keep': 'test_keys.py::test_when_a_run_does_what',
    'analysis.every': 'test_keys.py::test_when_a_run_does_what',
    'analysis.tokens': 'test_keys.py::test_when_a_run_does_what',
    'profile.start': 'test_keys.py::test_when_a_run_does_what',
    'profile.steps': 'test_keys.py::test_when_a_run_does_what',
    'deterministic': 'test_keys.py::test_flags_of_the_compiler',
    'compute_dtype': 'test_keys.py::test_type_of_activations',
    'accumulate': 'test_official.py::test_means_of_micro_batches',
    'optim.schedule': 'test_config.py::test_warm_up_peak_and_end',
    'optim.warmup_steps': 'test_going_on.py::test_is_refused_where_a_rate_would_change',
    'optim.decay_steps': 'test_going_on.py::test_a_decay_from_a_stable_checkpoint',
    'num_epochs': 'test_going_on.py::test_resolved_from_the_rows',
    'checkpoint.keep_every': 'test_going_on.py::test_milestones_stay',
    'checkpoint.minutes': 'test_going_on.py::test_by_the_clock',
    'checkpoint.best': 'test_going_on.py::test_the_best_stays',
    'model.family': 'test_config.py::test_wrong_values_are_named',
    'model.rope_type': 'test_models.py::test_forward_and_gradient_equal_the_float64_reference',
    'model.rope_factor': 'test_models.py::test_forward_and_gradient_equal_the_float64_reference',
    'model.rope_low_freq_factor': 'test_models.py::test_forward_and_gradient_equal_the_float64_reference',
    'model.rope_high_freq_factor': 'test_models.py::test_forward_and_gradient_equal_the_float64_reference',
    'model.rope_original_length': 'test_models.py::test_forward_and_gradient_equal_the_float64_reference',
    'model.num_positions': 'test_masked_language.py::test_parameters_and_flops',
    'model.num_types': 'test_masked_language.py::test_parameters_and_flops',
    'task.name': 'test_masked_language.py::test_it_learns_and_says_what',
    'task.learn': 'test_instructions.py::test_all_tokens',
    'task.mask_rate': 'test_masked_language.py::test_shares',
    'task.mask_id': 'test_masked_language.py::test_shares',
    'task.online.reward': 'test_reward_functions.py::test_what_it_is_called_with',
    'task.online.algorithm': 'test_online.py::test_losses_and_gradients_are_trls',
    'task.online.completions': 'test_online_runs.py::test_tools_read_the_run',
    'task.online.max_new_tokens': 'test_online_runs.py::test_what_is_recorded',
    'task.online.temperature': 'test_online.py::test_gradient_is_that_of_plain_log_softmax',
    'task.online.beta': 'test_online.py::test_the_reference_counts_where_the_keys_say',
    'task.online.kl': 'test_online.py::test_the_reference_counts_where_the_keys_say',
    'task.online.clip': 'test_online.py::test_losses_and_gradients_are_trls',
    'task.online.updates': 'test_online_runs.py::test_inner_updates_are_clipped',
    'task.preference.loss': 'test_preference.py::test_losses_and_gradients_are_trls',
    'task.preference.beta': 'test_preference.py::test_smoothed_by_hand',
    'task.preference.label_smoothing': 'test_preference.py::test_smoothed_by_hand',
    'task.preference.reference': 'test_preference_runs.py::test_precomputed_is_the_network',
    'task.reward.centering': 'test_reward.py::test_by_hand',
    'task.classification.label_smoothing': 'test_classification.py::test_losses_by_hand',
    'task.classification.mixup': 'test_classification.py::test_mixup',
    'task.classification.cutmix': 'test_classification.py::test_cutmix',
    'model.gelu': 'test_vit.py::test_kinds',
    'model.image_size': 'test_vit.py::test_refused',
    'model.patch_size': 'test_vit.py::test_refused',
    'model.num_classes': 'test_vit.py::test_refused',
    'model.positions': 'test_vit.py::test_kinds',
    'model.pool': 'test_vit.py::test_kinds',
    'model.representation': 'test_vit.py::test_kinds',
    'model.pixels': 'test_vit.py::test_kinds',
    'optim.rate_factors': 'test_rate_factors.py::test_every_weight_moves_by_its_factor',
    'stability.every': 'test_signs.py::test_they_change_nothing',
    'stability.rows': 'test_probe.py::test_equals_the_reference',
    'optim.ema': 'test_running_average.py::test_a_run',
    'model.init': 'test_models.py::test_scaled',
    'model.init_std': 'test_models.py::test_standard_deviations',
    'model.embed_std': 'test_models.py::test_standard_deviations',
    'model.scale_embed': 'test_placements.py::test_scaled_embeddings',
    'model.ramp_steps': 'test_ramp.py::test_the_own_step_of_weights_and_one_that_is_traced_give_the_same_bits',
    'model.ramp_offset': 'test_ramp.py::test_the_own_step_of_weights_and_one_that_is_traced_give_the_same_bits',
    'model.remat': 'test_models.py::test_remat_saves_memory',
    'model.scan_unroll': 'test_models.py::test_remat_saves_memory',
    'model.attention': 'test_attention.py::test_where_cudnn_computes',
    'data.source': 'test_rows.py::test_data_sets_are_prepared_first',
    'data.path': 'test_main.py::test_is_named',
    'data.validation_path': 'test_validation_files.py::test_each_split_has_its_files',
    'data.name': 'test_datasets.py::test_open_source',
    'data.data_dir': 'test_datasets.py::test_open_source',
    'data.split': 'test_keys.py::test_what_a_run_begins_with',
    'data.tokenizer': 'test_data_runs.py::test_vocabulary',
    'data.tokenizer_path': 'test_tokenizers.py::test_huggingface_needs_a_path',
    'data.mode': 'test_keys.py::test_what_a_run_begins_with',
    'data.template': 'test_chat.py::test_alpaca',
    'data.held_out': 'test_instructions.py::test_splits',
    'data.max_pixels': 'test_image_examples.py::test_too_many_pixels',
    'data.skip_bad': 'test_image_examples.py::test_replaced_by_the_next',
    'data.images.interpolation': 'test_augment.py::test_bicubic_by_pillow',
    'data.images.eval_crop': 'test_augment.py::test_resized_and_cut_by_opencv',
    'data.images.crop': 'test_augment.py::test_no_crop',
    'data.images.min_area': 'test_augment.py::test_least_area',
    'data.images.flip': 'test_augment.py::test_flips',
    'data.images.policy': 'test_augment.py::test_policies_are_applied',
    'data.images.color_jitter': 'test_augment.py::test_every_input_stays',
    'data.images.erasing': 'test_augment.py::test_share',
    'data.workers': 'test_keys.py::test_when_a_run_does_what',
    'eval.first': 'test_first_evaluation.py::test_the_loss_before_the_first_update',
    'eval.samples': 'test_generate.py::test_samples_of_a_run',
    'eval.split': 'test_keys.py::test_what_a_run_begins_with',
    'mesh.data': 'test_mesh.py::test_of_a_run',
    'mesh.fsdp': 'test_mesh.py::test_of_a_run',
    'mesh.tensor': 'test_mesh.py::test_of_a_run',
    'processes.timeout': 'test_processes.py::test_one_that_never_comes_is_named',
    'processes.secret': 'test_roll_call.py::test_of_the_key',
    'processes.stall': 'test_keys.py::test_when_a_run_does_what',
    'expected.accuracy': 'test_papers.py::test_images',
    'expected.perplexity': 'test_papers.py::test_got_paper_and_difference',
    'expected.tokens': 'test_papers.py::test_every_cell_builds',
    'expected.tasks': 'test_task_tables.py::test_beside_the_papers',
    'expected.source': 'test_papers.py::test_got_paper_and_difference',
    'device': 'test_main.py::test_is_named',
    'collapse': 'test_main.py::test_a_collapsed_network',
    'compat': 'test_official.py::test_what_it_decides_of_the_network',
    'tune.method': 'test_tuning_runs.py::test_only_what_is_trained_moves_and_is_saved',
    'tune.train': 'test_tuning_runs.py::test_only_what_is_trained_moves_and_is_saved',
    'tune.rank': 'test_tuning.py::test_what_a_matrix_with_an_adapter_computes',
    'tune.alpha': 'test_tuning.py::test_what_a_matrix_with_an_adapter_computes',
    'tune.dropout': 'test_tuning.py::test_dropout_by_example',
    'tune.matrices': 'test_tuning.py::test_chosen_matrices',
    'tune.base_dtype': 'test_tuning.py::test_the_base_in_bfloat16',
    'tune.layers': 'test_tuning.py::test_lisa_draws_uniformly_without_replacement',
    'tune.interval': 'test_tuning.py::test_lisa_draws_uniformly_without_replacement',
    'init_from': 'test_start.py::test_a_hugging_face_folder',
    'resume_from': 'test_start.py::test_goes_on_in_another_folder',
}


def test_every_key_is_here():
    """A new key fails until a test shows what it changes."""
    here = [*{key for _, key, _ in CHANGES}, *STATES, *ELSEWHERE]
    assert sorted(here) == sorted(DEFAULTS)


@pytest.mark.parametrize('place', sorted(set(ELSEWHERE.values())))
def test_named_tests_are_there(place):
    file, _, name = place.partition('::')
    [path] = pathlib.Path(__file__).parents[1].rglob(file)
    assert re.search(rf'^ *def {name}\(', path.read_text(), re.MULTILINE)


def built(**changes):
    values = configs.default()
    values.update_from_flattened_dict(changes)
    return configs.build(values)


def program(**changes):
    return Program(built(**SMALL | changes), meshes.make_mesh(configs.Mesh(1, 1, 1), jax.devices('cpu')))


BATCHES = [batch_of(np.random.default_rng(seed)) for seed in (0, 1)]


@functools.cache
def first_weights():
    return reference.init(np.random.default_rng(2), ['post', 'pre'], **SIZES)


@functools.cache
def two_updates(run):
    """(weights, projectors of galore by layer of each update) of a program."""
    ours = program(**RUNS[run])
    state = ours.init(jax.random.key(0)).replace(params=to_jax(ours.model, first_weights()))
    projectors = []
    for batch in BATCHES:
        state, _ = ours.train_step(state, batch)
        if run == 'linear':
            layers = jax.device_get(state.opt_state[trees.STACKED])
            of = [layers[f'segment_{i}'][0].inner_states['matrix'].inner_state.projector for i in range(2)]
            projectors.append([layer['attention'] | layer['mlp'] for layer in of])
    return ours.model, jax.device_get(state.params), projectors


def rates(optim, num_steps):
    """Of updates 1 and 2."""
    warmup = round(optim.warmup_ratio * num_steps)

    def of(update):
        if update <= warmup:
            return update / warmup
        done, low = (update - warmup) / (num_steps - warmup), optim.min_ratio
        if optim.schedule == 'cosine':
            return low + (1 - low) * (1 + math.cos(math.pi * done)) / 2
        if optim.schedule == 'linear':
            return 1 - (1 - low) * done
        falling = max(1, round(optim.decay_ratio * num_steps))
        return 1 - (1 - low) * max(0, update - (num_steps - falling)) / falling

    return [optim.learning_rate * of(update) for update in (1, 2)]


def expected(config, projectors):
    """The weights after two updates, by the reference."""
    optim, weights, history = config.optim, first_weights(), []

    def moved(name, leaf, grads, layer=None):
        at, decay = lrs[: len(grads)], optim.weight_decay * (leaf.ndim == 2)
        if optim.name == 'galore' and leaf.ndim == 2 and layer is not None:
            signs = [np.asarray(of[layer][name]['kernel'][0])[:, : optim.galore_rank] for of in projectors]
            galore = optim.galore_rank, optim.galore_gap, optim.galore_scale
            return reference.galore(leaf, grads, at, *galore, optim.b1, optim.b2, optim.eps, decay, signs)
        return reference.adamw(leaf, grads, at, optim.b1, optim.b2, optim.eps, decay)

    def grouped(x, w, attention, mlp, norm, l, L):
        return reference.pre(x, w, attention, mlp, functools.partial(norm, groups=config.model.norm_groups), l, L)

    names = config.model.norm_position.split(',')
    sizes = {'heads': config.model.num_heads, 'kv_heads': config.model.num_heads}
    sizes |= {'eps': config.model.norm_eps, 'theta': config.model.rope_theta}
    lrs, new = rates(optim, config.num_steps), weights
    for batch in BATCHES:
        rows = (batch[name] for name in ('inputs', 'targets', 'loss_mask'))
        with unittest.mock.patch.dict(reference.PLACEMENTS, group_pre=grouped):
            grads = reference.gradients(new, *rows, names, **sizes)
        norm = np.sqrt(sum(np.square(grad).sum() for grad in jax.tree.leaves(grads)))
        by = min(1, optim.clip_norm / norm) if optim.clip_norm else 1
        history.append(jax.tree.map(lambda grad, by=by: grad * by, grads))
        new = {
            name: moved(name, leaf, [grads[name] for grads in history])
            for name, leaf in weights.items()
            if name != 'layers'
        }
        new['layers'] = [
            {
                name: moved(name, leaf, [grads['layers'][i][name] for grads in history], i)
                for name, leaf in layer.items()
            }
            for i, layer in enumerate(weights['layers'])
        ]
    return new


def distance(run, config):
    """Largest difference of two updates of a program from the reference's under `config`, in learning rates."""
    model, found, projectors = two_updates(run)
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), found, to_jax(model, expected(config, projectors)))
    return max(jax.tree.leaves(apart)) / RUNS[run]['optim.learning_rate']


@pytest.mark.parametrize('run', RUNS)
def test_two_updates_are_the_references(run):
    assert distance(run, built(**SMALL | RUNS[run])) < 1e-3


@pytest.mark.parametrize('run, key, other', CHANGES)
def test_the_key_matters(run, key, other):
    """Were it ignored, the test above would fail: with another value the reference goes elsewhere."""
    assert distance(run, built(**SMALL | RUNS[run] | {key: other})) > 1e-2


@pytest.mark.parametrize('key', STATES)
def test_what_training_holds(key):
    def held(**changes):
        state = program(**{'model.norm_position': 'mix', **changes}).state
        return [(name, leaf.shape, leaf.dtype) for name, leaf in trees.named_leaves(state)]

    assert held(**{key: STATES[key]}) != held()


class Begun(Exception):
    """Ends a run where its first step would be."""


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    return write(tmp_path_factory.mktemp('data') / 'text.jsonl', texts(0, 300))


def run_of(corpus, **changes):
    data = {'data.source': 'jsonl', 'data.path': str(corpus), 'data.tokenizer': 'bytes', 'model.vocab_size': 259}
    return dataclasses.asdict(built(**SMALL | data | {'analysis.tokens': 0, 'num_steps': 1} | changes))


def test_what_a_run_begins_with(corpus, tmp_path, monkeypatch):
    """The seed gives the weights and nothing else, data.seed the order of the rows."""

    def fit(state, step, batches, hooks, **_):
        raise Begun(np.asarray(state.params['head']['kernel']), np.asarray(next(batches)['inputs']))

    def open_rows(data, split, *others):
        splits.append(split)
        return opened(data, split, *others)

    splits, opened = [], data_rows.open_rows
    monkeypatch.setattr(data_rows, 'open_rows', open_rows)
    monkeypatch.setattr(Program, 'compile', lambda self: (None, None))
    monkeypatch.setattr(loop, 'fit', fit)
    begun = {}
    runs = {
        '': {}, 'again': {}, 'seed': {'seed': 1}, 'data': {'data.seed': 1}, 'mode': {'data.mode': 'concat'},
        'split': {'data.split': 'validation', 'eval.split': 'train'},
    }  # fmt: skip
    for name, changes in runs.items():
        with pytest.raises(Begun) as ended:
            main.run(run_of(corpus, **changes), tmp_path / f'run{name}')
        begun[name] = ended.value.args
    same = {name: [np.array_equal(a, b) for a, b in zip(of, begun[''], strict=True)] for name, of in begun.items()}
    other_data = dict.fromkeys(('data', 'mode', 'split'), [True, False])
    assert same == {'': [True, True], 'again': [True, True], 'seed': [False, True]} | other_data
    assert splits[:2] == ['train', 'validation'] and splits[-2:] == ['validation', 'train']


def test_when_a_run_does_what(corpus, tmp_path, monkeypatch):
    samples, profiled = [], []

    class Analyses(during.Analyses):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            samples.append(sum(batch['loss_mask'].sum() for batch in self._batches))

        def __call__(self, params, step, reference):
            return {'analysis/variance': [1.0, 1.0]}

    def read(dataset, start, workers):
        asked.add(workers)
        return reading(dataset, start, workers=0)

    asked, watched, reading = set(), set(), batches.read
    monkeypatch.setattr(batches, 'read', read)
    monkeypatch.setattr(processes, 'watch', watched.add)
    monkeypatch.setattr(during, 'Analyses', Analyses)
    monkeypatch.setattr(hooks, 'profiled', lambda batches, first, *keys: profiled.append(keys[:2]) or batches)
    keys = {
        'batch_size': 4, 'seq_length': 12, 'num_steps': 4, 'log_every': 3, 'eval.every': 2, 'eval.tokens': 20,
        'checkpoint.every': 1, 'checkpoint.keep': 2, 'analysis.every': 3, 'analysis.tokens': 16,
        'profile.start': 3, 'profile.steps': 5, 'data.workers': 2, 'processes.stall': 77.0,
    }  # fmt: skip
    main.run(run_of(corpus, **keys), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    steps = lambda name: [line['step'] for line in lines if name in line]  # noqa: E731
    assert steps('step') == [2, 3, 4] and steps('eval/loss') == [2, 4] and steps('analysis/variance') == [3, 4]
    assert {line['train/positions_per_step'] for line in lines} == {4 * 12}
    assert 20 <= lines[-1]['eval/tokens'] < 20 + 4 * 12
    assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['3', '4']
    assert len(samples) == 1 and 16 <= samples[0] < 16 + 12
    assert profiled == [(3, 5)] and asked == {0, 2} and watched == {0, 77.0}


@pytest.mark.parametrize('deterministic', [False, True])
def test_flags_of_the_compiler(corpus, tmp_path, monkeypatch, deterministic):
    flags = os.environ.get('XLA_FLAGS', '')
    monkeypatch.setenv('XLA_FLAGS', flags)  # puts them back
    monkeypatch.setattr(run, 'Program', None)
    with pytest.raises(TypeError):
        main.run(run_of(corpus, deterministic=deterministic), tmp_path)
    added = os.environ['XLA_FLAGS'].removeprefix(flags).strip()
    assert added == ('--xla_gpu_deterministic_ops=true' if deterministic else '')


@pytest.mark.parametrize('compute_dtype', ['float32', 'bfloat16'])
def test_type_of_activations(compute_dtype):
    ours = program(compute_dtype=compute_dtype)
    lowered = ours.eval_step.lower(ours.state.params, ours.batch(8)).as_text()
    assert ('bf16' in lowered) == (compute_dtype == 'bfloat16')


MEANT_FOR_TASKS = {  # a task, a key that it does not read, another value than its default
    'preference': ('task.reward.centering', 0.1), 'online': ('task.preference.beta', 0.5),
    'reward': ('task.preference.loss', 'ipo'), 'language': ('task.online.reward', 'a:b'),
    'masked_language': ('data.template', 'plain'), 'instructions': ('task.classification.mixup', 0.2),
    'classification': ('data.mode', 'pack'),
}  # fmt: skip


@pytest.mark.parametrize('task, key', MEANT_FOR_TASKS.items(), ids=MEANT_FOR_TASKS)
def test_keys_of_another_task_are_refused(task, key):
    """A run from before there was this check is still read."""
    (path, value), values = key, {'task.name': task, 'init_from': 'a'}
    values |= {'task.online.reward': 'a:b'} if task == 'online' else {}
    assert built(**{path: DEFAULTS[path]} | values).task.name == task
    with pytest.raises(UsageError, match=f'^config.{path}={value} has no meaning for config.task.name={task}: it is'):
        built(**{path: value} | values)
    given = configs.default()
    given.update_from_flattened_dict({path: value} | values)
    assert configs.flatten(configs.build(given, resolved=True))[path] == value
