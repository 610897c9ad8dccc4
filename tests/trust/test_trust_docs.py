"""The documents say what the code does: tests they name exist, numbers they give are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lasagna.trust.evidence import MAX_ATTESTED_BYTES, MAX_CLAIMS_BYTES, MAX_EVIDENCE_BYTES
from lasagna.trust.records import (
    MAX_NAME_BYTES,
    MAX_RANK,
    MAX_RECORDS_PER_REQUEST,
    MAX_ROWS,
    RECORD_OVERHEAD,
)
from lasagna.trust.release import GRANT_BYTES, PAYLOAD_BYTES
from lasagna.trust.request import CAPSULE_BYTES

ROOT = Path(__file__).parents[2]
THREATS = (ROOT / "docs/explanation/threat-model.md").read_text()
RECORDS = (ROOT / "docs/reference/records.md").read_text()
SOURCES = "\n".join(path.read_text() for path in (ROOT / "src/lasagna/trust").glob("*.py"))
TESTS = "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))


def test_every_test_that_the_documents_name_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", THREATS + RECORDS))
    assert len(named) > 25
    assert named <= set(re.findall(r"def (test_\w+)\(", TESTS))


def test_every_attack_that_is_tested_is_in_the_threat_model() -> None:
    """Of the two files that an auditor reads; variations of sizes and versions aside."""
    attacks = (Path(__file__).parent / "test_trust_attacks_request.py").read_text()
    tested = set(re.findall(r"def (test_\w+)\(", attacks))
    told = set(re.findall(r"`(test_\w+)`", THREATS))
    assert tested - told == {
        "test_an_honest_run_from_client_to_client",
        "test_an_enclave_of_another_service_opens_nothing",
    }


def test_every_label_of_the_code_is_documented_and_the_reverse() -> None:
    label = re.compile(r'"(lasagna/v1/[\w-]+)"')
    assert set(label.findall(RECORDS)) == set(label.findall(SOURCES))


@pytest.mark.parametrize(
    "words",
    [
        f"client to service, {CAPSULE_BYTES} bytes",
        f"one tensor, {RECORD_OVERHEAD} bytes longer",
        f"broker to enclave, {GRANT_BYTES} bytes",
        f"sealed payload ({PAYLOAD_BYTES})",
        f"1 to {MAX_ROWS}",
        f"UTF-8, 1 to {MAX_NAME_BYTES}",
        f"at most {MAX_RANK} sizes",
        f"at most 2^{MAX_RECORDS_PER_REQUEST.bit_length() - 1} records",
        f"at most {MAX_ATTESTED_BYTES // 1024} KiB",
        f"{MAX_EVIDENCE_BYTES // 1024} KiB evidence and {MAX_CLAIMS_BYTES // 1024} KiB claims",
    ],
)
def test_numbers_in_the_reference_are_the_codes(words: str) -> None:
    assert words in " ".join(RECORDS.split())
