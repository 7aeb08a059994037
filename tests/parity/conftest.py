"""transformers without a network, and where it keeps what it copies."""

import os

import pytest

# Before transformers and datasets are imported: nothing here asks the network.
os.environ['HF_HUB_OFFLINE'] = os.environ['HF_DATASETS_OFFLINE'] = '1'

import transformers


@pytest.fixture(autouse=True, scope='session')
def modules(tmp_path_factory):
    """Modelling files are copied into a folder of this process, never into the user's cache.

    One folder for all tests: the package that transformers makes of it is imported once, with that folder's path.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, 'HF_MODULES_CACHE', str(tmp_path_factory.mktemp('modules')))
        yield
