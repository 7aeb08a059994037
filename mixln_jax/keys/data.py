"""Keys of what is learned, and from which text or images."""

import dataclasses

from mixln_jax.keys.classification import Classification
from mixln_jax.keys.field import LARGEST_VOCABULARY, group, key
from mixln_jax.keys.images import Images
from mixln_jax.keys.online import Online
from mixln_jax.keys.preference import Preference, Reward

WORKERS = 1024
# Tasks by what they learn from.
TEXTS, ANSWERS = ('language', 'masked_language'), ('instructions', 'preference', 'reward', 'online')
IMAGES = ('classification',)


@dataclasses.dataclass(frozen=True)
class Task:
    """What the network learns."""

    name: str = key(
        'language',
        'language: predict the next token; masked_language: predict hidden tokens, as BERT does; instructions: predict '
        'the answers of conversations; preference: prefer the chosen one of two answers; reward: score texts, the '
        'chosen one of two answers higher; online: learn from rewards of generated answers; classification: '
        'tell images apart',
        choices=('language', 'masked_language', 'instructions', 'preference', 'reward', 'online', 'classification'),
    )
    learn: str = key(
        'completions',
        'instructions: tokens that are learned; completions: what the assistant says; all: what others say too',
        choices=('completions', 'all'),
        tasks=('instructions',),
    )
    mask_rate: float = key(
        0.15,
        'masked_language: share of the tokens that are hidden',
        above=0.0,
        at_most=1.0,
        tasks=('masked_language',),
    )
    mask_id: int = key(
        -1,
        'masked_language: id of the token that hides others; -1: the last one of config.model.vocab_size',
        at_least=-1,
        below=LARGEST_VOCABULARY,
        tasks=('masked_language',),
    )
    preference: Preference = group(Preference, tasks=('preference',))
    reward: Reward = group(Reward, tasks=('reward',))
    online: Online = group(Online, tasks=('online',))
    classification: Classification = group(Classification, tasks=('classification',))

    @property
    def num_outputs(self) -> int:
        """Number of outputs of the head that the task needs; 0: one for each token of the vocabulary."""
        return 1 if self.name == 'reward' else 0


@dataclasses.dataclass(frozen=True)
class Data:
    """Where text or images come from, and how text becomes rows of tokens."""

    source: str = key(
        'tfds',
        'kind of source',
        choices=('tfds', 'tokens', 'jsonl', 'text', 'stdlib', 'shelves', 'images', 'idx', 'npz', 'digits'),
    )
    path: str = key(
        '',
        'files of a jsonl or text source: paths or globs, separated by commas; folder of prepared tokens; folder, zip '
        'or npz file of images, folder of idx files',
        may_change=True,
    )
    validation_path: str = key(
        '',
        'files to evaluate on, of a jsonl or text source; folder, zip or npz file of images; empty: what data.path has '
        'for it, else a part of it',
        may_change=True,
    )
    name: str = key('c4/en', 'name of a tfds data set')
    data_dir: str = key(
        '', 'folder or gs:// bucket that holds tfds data sets; empty: ~/tensorflow_datasets', may_change=True
    )
    split: str = key('train', 'split to train on: train, validation, or what a tfds data set has')
    tokenizer: str = key('sentencepiece', 'kind of tokenizer', choices=('sentencepiece', 'huggingface', 'bytes'))
    tokenizer_path: str = key(
        '',
        'file or URL of a sentencepiece model or a huggingface tokenizer.json; empty: the T5 vocabulary',
        may_change=True,
    )
    mode: str = key(
        'pad',
        'pad: one document per row, cut or padded; pack: several pieces of documents per row, each of which attends to '
        'itself alone; concat: documents end to end',
        choices=('pad', 'pack', 'concat'),
        tasks=TEXTS + ANSWERS,
    )
    template: str = key(
        'chat',
        "instructions, preference, reward, online: how a record becomes text; chat: the tokenizer's own chat template; "
        "alpaca; llm_adapters: LLM-Adapters' form of alpaca, for Commonsense170K; chatml; plain: one turn after the "
        'other',
        choices=('chat', 'alpaca', 'llm_adapters', 'chatml', 'plain'),
        tasks=ANSWERS,
    )
    held_out: float = key(
        0.05,
        'records, images: share of them that is for validation alone, by their hashes (at least 20 '
        'records, or half of fewer than 40); 0: none',
        at_least=0.0,
        below=1.0,
        tasks=ANSWERS + IMAGES,
    )
    workers: int = key(
        0, 'processes that prepare batches; 0: threads of this process', at_least=0, at_most=WORKERS, may_change=True
    )
    seed: int = key(0, 'seed of the order of the rows and of how images vary', at_least=0, below=2**32)
    max_pixels: int = key(
        100_000_000, 'images: pixels of the largest one that is decoded', at_least=1, below=2**40, tasks=IMAGES
    )
    skip_bad: int = key(
        0,
        'images: unreadable ones that are replaced by the next, in each process that reads, before one is an error',
        at_least=0,
        below=2**32,
        may_change=True,
        tasks=IMAGES,
    )
    images: Images = group(Images, tasks=IMAGES)
