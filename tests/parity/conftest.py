"""transformers without a network, and where it keeps what it copies."""

import os

import pytest

os.environ['HF_HUB_OFFLINE'] = '1'  # before transformers is imported: nothing here asks the network

import transformers


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """Modelling files are copied into a folder of the test, never into the user's cache."""
    monkeypatch.setattr(transformers.dynamic_module_utils, 'HF_MODULES_CACHE', str(tmp_path / 'modules'))
