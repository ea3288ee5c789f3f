"""Self-consistency: the majority, ties, and samples without an answer."""

from quantlab.generation.votes import majority


def test_the_most_votes_win() -> None:
    assert majority(["5", "7", "7"]) == ("7", {"7": 2, "5": 1})


def test_of_equal_ones_that_which_came_first_wins() -> None:
    """And votes are listed so."""
    answer, votes = majority(["9", "5", "7", "5", "7"])
    assert answer == "5"
    assert list(votes.items()) == [("5", 2), ("7", 2), ("9", 1)]


def test_a_sample_without_an_answer_does_not_vote() -> None:
    assert majority(["", "", "", "3"]) == ("3", {"3": 1})
    assert majority(["", ""]) == ("", {})
