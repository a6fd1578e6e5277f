"""What the tests of the model package share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mova.demo import small_model


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of a small model, with its processor and its experts; do not write to it."""
    pipeline = small_model()
    directory = tmp_path_factory.mktemp("model")
    pipeline.model.save_pretrained(directory)
    pipeline.processor.save_pretrained(directory)
    yield directory
