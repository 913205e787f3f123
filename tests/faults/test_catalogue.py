"""The table in docs/reliability.md is what the suite declares."""

import catalogue
import pytest


def test_the_table_is_up_to_date():
    text = catalogue.DOCUMENT.read_text(encoding="utf-8")
    assert catalogue.BEGIN in text and catalogue.END in text
    assert catalogue.document(text) == text, "run python tests/faults/catalogue.py"


def test_every_file_with_faults_is_in_the_table():
    files = {path.stem for path in catalogue.FOLDER.glob("test_*.py")}
    assert files - {"test_catalogue"} == set(catalogue.PARTS)


@pytest.mark.parametrize(
    "outcome",
    [catalogue.Outcome(0, "a … b"), catalogue.Outcome(2, "b a"), catalogue.Outcome(2, "a")],
)
def test_another_outcome_than_the_declared_is_seen(outcome):
    declared = catalogue.Fault("", 2, ("a", "b"), "")
    catalogue.check(declared, catalogue.Outcome(2, "it is a, then b"))
    with pytest.raises(AssertionError):
        catalogue.check(declared, outcome)
