"""Small TensorFlow data sets, written without TensorFlow."""

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from mixln_jax.data import datasets

SHARDS = [[f'größer {shard}.{i}' for i in range(count)] for shard, count in enumerate((5, 0, 7, 1))]


def write(root, shards=SHARDS, folder='c4/en/3.1.0', split='train', fields=('text', 'url')):
    """Writes a data set whose first field is text, bytes as they are; returns its folder."""
    folder = root / folder
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict({field: tfds.features.Text() for field in fields})
    counts = []
    for i, texts in enumerate(shards):
        writer = ArrayRecordWriter(str(folder / f'c4-{split}.array_record-{i:05}-of-{len(shards):05}'), 'group_size:1')
        examples = [features.serialize_example({field: '' for field in fields} | {fields[0]: text}) for text in texts]
        for example in examples:
            writer.write(example)
        writer.close()
        counts.append({'documents': len(texts), 'bytes': sum(map(len, examples))})
    datasets.write_description(str(folder), 'c4', datasets.texts(fields), {split: counts})
    return folder


def write_images(root, images, labels, classes, folder='pets/1.0.0'):
    """Writes a data set of image files and labels, bytes and numbers as they are."""
    folder = root / folder
    folder.mkdir(parents=True)
    examples = []
    for image, label in zip(images, labels, strict=True):
        example = tf_example_pb2.Example()
        example.features.feature['image'].bytes_list.value.append(image)
        example.features.feature['label'].int64_list.value.append(label)
        examples.append(example.SerializeToString())
    writer = ArrayRecordWriter(str(folder / 'pets-train.array_record-00000-of-00001'), 'group_size:1')
    for example in examples:
        writer.write(example)
    writer.close()
    counts = {'documents': len(examples), 'bytes': sum(map(len, examples))}
    datasets.write_description(str(folder), 'pets', datasets.images(classes), {'train': [counts]})
    return folder
