"""Thresholds: what passes, what fails, what is refused; the XML is read back by an XML parser."""

import json
import math
from xml.etree import ElementTree as ET

import pytest

from calipers.cli.options import share_of
from calipers.errors import DataError
from calipers.evaluate.gate import Requirement, gate, junit, read

RESULT = {
    "model": "net.onnx", "data": "digits/test", "clean_accuracy": 0.95, "certified_accuracy": 0.8,
    "empirical_accuracy": 0.9, "confidence_95": None,
}  # fmt: skip
SAMPLE = RESULT | {
    "confidence_95": {
        "clean": [0.93, 0.97],
        "certified": [0.76, 0.84],
        "empirical": [0.87, 0.92],
    }
}


@pytest.mark.parametrize(
    ("least", "passes"), [(0.79, True), (0.8, True), (math.nextafter(0.8, 1), False), (1.0, False)]
)
def test_a_threshold_holds_up_to_the_share_itself(least, passes):
    (one,) = gate(RESULT, [Requirement("certified", least)])
    assert one.passed is passes


def test_a_sample_counts_as_its_worse_confidence_limit():
    wanted = [Requirement("certified", 0.78), Requirement("empirical", 0.86)]
    assert [c.passed for c in gate(SAMPLE, wanted)] == [False, True]
    assert [c.passed for c in gate(SAMPLE, wanted, estimates=True)] == [True, True]


def test_the_limit_never_raises_a_share():
    odd = SAMPLE | {"confidence_95": SAMPLE["confidence_95"] | {"clean": [0.99, 1.0]}}
    (one,) = gate(odd, [Requirement("clean", 0.96)])
    assert not one.passed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"certified_accuracy": math.nan}, "certified_accuracy is nan"),
        ({"certified_accuracy": "0.9"}, "not a share"),
        ({"certified_accuracy": True}, "not a share"),
        ({"empirical_accuracy": None}, "empirical_accuracy"),
        ({"certified_accuracy": 0.99}, "does not hold"),
        ({"confidence_95": {"certified": []}}, "no pair"),
        ({"confidence_95": {"certified": [math.nan, 1]}}, "no pair"),
        ({"confidence_95": 3}, "no pair"),
    ],
)
def test_a_result_that_proves_nothing_never_passes(change, message):
    with pytest.raises(DataError, match=message):
        gate(RESULT | change, [Requirement("certified", 0.0)])


def test_a_gate_that_checks_nothing_is_refused():
    with pytest.raises(ValueError, match="no requirement"):
        gate(RESULT, [])
    with pytest.raises(ValueError, match="twice"):
        gate(RESULT, [Requirement("clean", 0.1), Requirement("clean", 0.9)])


def test_the_xml_counts_failures_and_keeps_names_text():
    wanted = [Requirement("certified", 0.9), Requirement("clean", 0.9)]
    named = RESULT | {"model": '<b a="1">&\x00'}
    root = ET.fromstring(junit(gate(named, wanted), named))  # noqa: S314 - our own
    suite = root.find("testsuite")
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    cases = suite.findall("testcase")
    assert cases[0].get("classname").startswith('<b a="1">&')
    assert "required 90.00%" in cases[0].find("failure").get("message")
    assert cases[1].find("failure") is None


def test_only_results_of_audits_are_read(tmp_path):
    file = tmp_path / "a.json"
    for text in ("", "[1]", "{}", "{" * 100_000, "<html>"):
        file.write_text(text)
        with pytest.raises(DataError, match="audit"):
            read(file)
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("text", "share"), [("85%", 0.85), ("0.85", 0.85), ("1", 1.0), (".5", 0.5)]
)
def test_shares_are_read(text, share):
    assert share_of(text, "--clean") == share


@pytest.mark.parametrize("text", ["85", "101%", "-1", "nan", "", "8/10", "1e-1"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(ValueError, match="85%"):
        share_of(text, "--clean")


def test_the_command_says_what_failed(run, tmp_path):
    file, xml = tmp_path / "a.json", tmp_path / "a.xml"
    file.write_text(json.dumps(RESULT))
    code, out, _ = run("gate", file, "--certified", "75%", "--empirical", "0.95", "--junit", xml)
    assert code == 1
    assert out.splitlines()[0].startswith("pass  certified accuracy 80.00%")
    assert out.splitlines()[1].startswith("FAIL  empirical accuracy 90.00%")
    assert ET.parse(xml).find("testsuite").get("failures") == "1"  # noqa: S314 - our own
    assert run("gate", file, "--certified", "75%")[0] == 0
    assert run("gate", file)[0] == 2
