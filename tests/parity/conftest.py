"""transformers without a network, and where it keeps what it copies."""

import os

import pytest

# Before transformers and datasets are imported: nothing here asks the network.
os.environ['HF_HUB_OFFLINE'] = os.environ['HF_DATASETS_OFFLINE'] = '1'

import transformers


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """Modelling files are copied into a folder of the test, never into the user's cache."""
    monkeypatch.setattr(transformers.dynamic_module_utils, 'HF_MODULES_CACHE', str(tmp_path / 'modules'))
