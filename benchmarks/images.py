"""Speed of the input pipeline of images, in images a second and core, against bare decoding and resizing.

python -m benchmarks.images --path imagenet-sample.zip [--rounds 9] [--repeat 4]
"""

import argparse
import pathlib
import resource
import tempfile
import time
import zipfile

import cv2
import numpy as np
import simplejpeg

from mixln_jax import config
from mixln_jax.data import batches
from mixln_jax.data.images import examples

BATCH = 100
RECIPES = {
    'inception crop, flip': {},
    'randaug(2,10)': {'policy': 'randaug(2,10)'},
    'rand-m9-mstd0.5-inc1, bicubic, jitter, erasing': {
        'policy': 'rand-m9-mstd0.5-inc1', 'interpolation': 'bicubic', 'color_jitter': 0.4, 'erasing': 0.25,
    },
}  # fmt: skip


def seconds(job):
    """CPU time of this process for `job()`: other programs on a shared machine count less."""
    start = time.process_time()
    job()
    return time.process_time() - start


def write_set(path, folder):
    """Writes the images of a zip file as a set of two classes; returns its path and the files."""
    with zipfile.ZipFile(path) as archive:
        content = [archive.read(name) for name in archive.namelist() if not name.endswith('/')]
    made = pathlib.Path(folder, 'set.zip')
    with zipfile.ZipFile(made, 'w') as archive:
        for number, body in enumerate(content):
            archive.writestr(f'{"ab"[number % 2]}/{number}.jpg', body)
    return made, content


def bare(content):
    """Decodes every image and resizes all of it."""
    for body in content:
        cv2.resize(simplejpeg.decode_jpeg(body), (224, 224), interpolation=cv2.INTER_LINEAR)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--path', required=True)
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--repeat', type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, content = write_set(options.path, folder)
        measure(path, content, options)


def measure(path, content, options):
    jobs = {}
    for name, keys in RECIPES.items():
        made = examples.open_examples(
            config.Data(source='images', path=str(path), held_out=0.0, images=config.Images(**keys)), 'train', 224
        )
        dataset = batches.training(made, seed=0, batch_size=BATCH)
        jobs[f'training: {name}'] = lambda dataset=dataset: [dataset[s] for s in range(options.repeat)]
    evaluation = batches.evaluation(made, BATCH)
    jobs['evaluation: small side 256, centre 224'] = lambda: [evaluation[0] for _ in range(options.repeat)]
    count = options.repeat * BATCH
    ceiling = lambda: [bare(content) for _ in range(options.repeat)]  # noqa: E731
    spent, ratios = {name: [] for name in jobs}, {name: [] for name in jobs}
    seconds(ceiling)
    below = [seconds(ceiling)]
    for _ in range(options.rounds):
        for name, job in jobs.items():
            spent[name].append(seconds(job))
            below.append(seconds(ceiling))
            ratios[name].append(spent[name][-1] / np.mean(below[-2:]))
    print('| | images/s/core | time : bare decoding and resizing | lowest to highest |\n|---|---|---|---|')
    print(f'| bare decoding and resizing | {count / np.median(below):,.0f} | 1 | |')
    for name in jobs:
        every = np.array(ratios[name])
        shown = f'{np.median(every):.3g} | {every.min():.3g} to {every.max():.3g}'
        print(f'| {name} | {count / np.median(spent[name]):,.0f} | {shown} |', flush=True)
    print(f'\nPeak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:,.0f} MB')


if __name__ == '__main__':
    main()
