"""Tables of rules: the first that is broken speaks, and those after it are not asked."""

from __future__ import annotations

from tightfit.runtime.rules import Rule, first_broken


def test_the_first_rule_that_is_broken_speaks():
    asked = []
    rules: tuple[Rule[int], ...] = (
        Rule(lambda number: asked.append("odd") or number % 2, lambda number: f"{number} is odd"),
        Rule(lambda number: asked.append("large") or number > 9, "too large"),
    )
    assert first_broken(rules, 11) == "11 is odd"
    assert asked == ["odd"]
    assert first_broken(rules, 12) == "too large"
    assert first_broken(rules, 2) is None
