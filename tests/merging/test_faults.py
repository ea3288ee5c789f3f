"""One error for all faults."""

import pytest

from quantlab.errors import InputError
from quantlab.merging.faults import Faults, MergeError, nearest


def test_nothing_to_say():
    Faults("file").check()


def test_one_and_several_each_once():
    faults = Faults("file")
    faults.add("wrong", "mend it")
    with pytest.raises(MergeError, match=r"^file: wrong; mend it$"):
        faults.check()
    faults.add("wrong", "mend it")
    faults.add("bad")
    with pytest.raises(InputError, match=r"^file: 2 faults: \(1\) wrong; mend it \(2\) bad$") as caught:
        faults.check()
    assert caught.value.faults == ("wrong; mend it", "bad")


def test_long_lists_are_not_cut_and_stay_in_one_line():
    faults = Faults("file")
    for i in range(500):
        faults.add(f"tensor {i} is\nmissing")
    with pytest.raises(MergeError) as caught:
        faults.check()
    assert all(f"tensor {i} is\\nmissing" in str(caught.value) for i in range(500))
    assert "\n" not in str(caught.value)


def test_nearest():
    assert nearest("tise", ["ties", "linear"]) == "did you mean ties?"
    assert nearest("LINEAR", ["ties", "linear"]) == "did you mean linear?"
    assert nearest("xyz", ["ties", "linear"]) == "known: ties, linear"
