"""Plans as files: recipes that can be read, edited and run again."""

from __future__ import annotations

import pytest
import yaml

from quantlab import InputError, open_checkpoint
from quantlab.formats import format_named
from quantlab.quantization.recipes import named_recipe
from quantlab.search.plan_file import Plan, check_plan_path, plan_text, write_plan
from quantlab.search.sensitivities import Sensitivities

FORMATS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


@pytest.fixture
def written(float_model, tmp_path):
    """A plan of three tensors in a file: (path, plan, checkpoint)."""
    checkpoint = open_checkpoint(float_model)
    names = [name for name in checkpoint.names if len(checkpoint.shape(name)) == 2][-3:]
    formats = {name: format_named(word) for name, word in zip(names, ("q5_1", "q4_0", "q8_0"), strict=True)}
    table = Sensitivities({(n, f): 0.5 for n in names for f in FORMATS}, dict.fromkeys(names, "x"))
    table.add(names[0], "q5_1", 0.00125, 0.0001)
    plan = Plan(formats, 1000, 5.0, 0.002)
    path = tmp_path / "plan.yaml"
    write_plan(path, plan_text(plan, table, dict.fromkeys(names, 77), ("one fact", "another")))
    return path, plan, checkpoint


def test_a_plan_is_a_recipe(written):
    path, plan, checkpoint = written
    recipe = named_recipe(str(path), checkpoint.family, checkpoint.names)
    for name in checkpoint.names:
        assert recipe.format_by_name(name) == plan.formats.get(name)


def test_it_tells_what_was_measured(written):
    path, plan, _ = written
    text = path.read_text(encoding="utf-8")
    first = next(iter(plan.formats))
    assert yaml.safe_load(text) == {"rules": [[name, format.name] for name, format in plan.formats.items()]}
    assert "# one fact\n# another\n" in text
    (line,) = (line for line in text.splitlines() if line.startswith(f"  - [{first},"))
    assert "77 bytes, 0.00125; q4_0 ~0.00125, q4_1 ~0.00125, q5_0 ~0.00125, q8_0 ~0.00125" in line


def test_only_an_untouched_plan_is_replaced(written):
    path, _, _ = written
    check_plan_path(path, overwrite=False)
    path.write_text(path.read_text(encoding="utf-8").replace("q5_1]", "q8_0]"), encoding="utf-8")
    with pytest.raises(InputError, match="is an edited plan; name another with --plan"):
        check_plan_path(path, overwrite=False)
    check_plan_path(path, overwrite=True)
    path.write_text("rules: []\n", encoding="utf-8")
    with pytest.raises(InputError, match="is no plan"):
        check_plan_path(path, overwrite=False)


def test_equal_choices_have_equal_digests(written):
    _, plan, _ = written
    same = Plan(dict(plan.formats), 1, 1.0, 1.0)
    other = Plan({**plan.formats, next(iter(plan.formats)): format_named("q4_1")}, 1, 1.0, 1.0)
    assert plan.digest == same.digest != other.digest
