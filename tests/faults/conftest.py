import catalogue
import pytest


@pytest.fixture
def seen(request):
    """Compares an outcome with what the test's fault declares; the test has to call it."""
    outcomes = []

    def compare(outcome):
        catalogue.check(request.function.fault, outcome)
        outcomes.append(outcome)

    yield compare
    assert outcomes, "nothing was compared with what the fault declares"
