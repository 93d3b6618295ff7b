"""What every test begins with."""

import pytest
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps one state a process; each test is a process of its own as far as it can tell."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
