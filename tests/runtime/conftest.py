"""What tests of the engine share."""

from __future__ import annotations

import pytest

from runtime.model_runner import ModelRunner


@pytest.fixture
def plans(monkeypatch):
    """Every plan that an engine of this test launches: that a mechanism ran is seen here."""
    seen, launch = [], ModelRunner.launch

    def recording(runner, plan):
        seen.append(plan)
        launch(runner, plan)

    monkeypatch.setattr(ModelRunner, "launch", recording)
    return seen
