"""Rows that models lack, worked by hand."""

import torch

from quantlab.merging.plan_types import Part, RowOverride, TensorPlan
from quantlab.merging.references import ModelReference
from quantlab.merging.row_filling import fill_rows

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tensor_plan(parts, base=None, overrides=()):
    model = ModelReference("m")
    made = tuple(Part(model, EMBEDDING, rows) for rows in parts)
    base = None if base is None else Part(model, EMBEDDING, base)
    return TensorPlan(EMBEDDING, (5, 1), "F32", "linear", base, made, {}, overrides)


def column(*values):
    return torch.tensor([[float(value)] for value in values])


def test_rows_that_models_lack_are_the_mean_of_the_others():
    plan = tensor_plan([(0, 1, -1, 2, -1), (0, -1, -1, 1, 2), (0, 1, 2, -1, -1)])
    tensors = [column(1, 2, 99, 4, 99), column(10, 99, 99, 40, 50), column(100, 200, 300, 99, 99)]
    fill_rows(plan, 0, None, tensors, None)
    assert [tensor[:, 0].tolist() for tensor in tensors] == [
        [1, 2, 300, 4, 50],
        [10, 101, 300, 40, 50],
        [100, 200, 300, 22, 50],
    ]


def test_rows_that_nobody_has_are_zeros():
    tensors = [column(1, float("nan")), column(2, float("inf"))]
    fill_rows(tensor_plan([(0, -1), (0, -1)]), 0, None, tensors, None)
    assert [tensor[:, 0].tolist() for tensor in tensors] == [[1, 0], [2, 0]]
    base = column(3, 99)
    fill_rows(tensor_plan([(0, -1)], base=(0, -1)), 0, base, [column(1, 99)], None)
    assert base[:, 0].tolist() == [3, 0]


def test_the_bases_row_comes_first():
    plan = tensor_plan([(0, -1, 1), (-1, -1, 2)], base=(0, 1, -1))
    base, tensors = column(1, 2, 99), [column(10, 99, 30), column(99, 99, 50)]
    fill_rows(plan, 0, base, tensors, None)
    assert base[:, 0].tolist() == [1, 2, 40]
    assert [tensor[:, 0].tolist() for tensor in tensors] == [[10, 2, 30], [1, 2, 50]]


def test_overrides_and_parts_of_a_tensor():
    source = Part(ModelReference("s"), HEAD)
    overrides = (RowOverride(0, source, 3, True), RowOverride(2, source, 4, False), RowOverride(3, None, -1, False))
    plan = tensor_plan([(0, 1, 2, -1), (0, 1, -1, -1)], base=(0, 1, -1, -1), overrides=overrides)
    full = [column(1, 2, 3, 99), column(10, 20, 99, 99), column(100, 200, 99, 99)]

    def read_row(part, row):
        assert part == source
        return torch.tensor([1000.0 + row])

    whole = [tensor.clone() for tensor in full]
    fill_rows(plan, 0, whole[2], whole[:2], read_row)
    assert [tensor[:, 0].tolist() for tensor in whole] == [
        [1003, 2, 3, 0],
        [1003, 20, 1004, 0],
        [1003, 200, 1004, 0],
    ]
    for first, last in ((0, 1), (1, 3), (3, 4)):
        part = [tensor[first:last].clone() for tensor in full]
        fill_rows(plan, first, part[2], part[:2], read_row)
        assert all(torch.equal(one, two[first:last]) for one, two in zip(part, whole, strict=True))
