"""The words of a verdict: who leads, what is decided of the others, and what would decide the rest."""

from __future__ import annotations

from partial_lora.launching.compare import Entry
from partial_lora.report import verdict
from partial_lora.report.sequential import AS_GOOD, LEADS, OPEN, WORSE, Referee, Standing


def group(*methods: str) -> list[Entry]:
    return [Entry(method, "0.13", (), best=1e-3) for method in methods]


def test_a_leader_is_not_among_those_that_are_open_while_looks_go_on() -> None:
    standings = {
        "lori, 0.13": Standing(OPEN, "lori, 0.13", seeds=2),
        "oft, 0.13": Standing(OPEN, "lori, 0.13", 0.01, -0.05, 0.07, 2),
    }
    found = Referee("lori, 0.13", standings, dict.fromkeys(standings, 3))
    first, *others = verdict.words(group("lori", "oft"), found, "accuracy", 0.01)
    assert first.startswith("lori leads")
    (line,) = others
    assert line.startswith("oft: ")
    assert "3 seeds" in line


def test_what_is_decided_is_said_of_each_method_and_the_rest_has_the_margin_that_it_meets() -> None:
    of = {
        "lori": Standing(LEADS, "lori, 0.13", seeds=5),
        "dora": Standing(WORSE, "lori, 0.13", 0.06, 0.02, 0.1, 2),
        "oft": Standing(AS_GOOD, "lori, 0.13", 0.002, -0.005, 0.009, 5),
        "hira": Standing(OPEN, "lori, 0.13", 0.01, -0.02, 0.0431, 5),
    }
    found = Referee("lori, 0.13", {f"{method}, 0.13": standing for method, standing in of.items()}, {})
    first, *others = verdict.words(group(*of), found, "accuracy", 0.01)
    lines = {line.split()[0].rstrip(":"): line for line in others}
    assert lines.keys() == {"dora", "oft", "hira"}
    assert "dropped after 2 seeds" in lines["dora"]
    assert "margin=4.4" in lines["hira"]
    assert "not all is decided" in first
