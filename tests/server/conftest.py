from __future__ import annotations

import pytest

from tests.server.serving import serve


@pytest.fixture(scope="module")
def server():
    with serve() as under_test:
        yield under_test
