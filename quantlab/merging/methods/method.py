"""What a merge method is: a pure function of tensors whose signature is its schema, and a row that says what it needs.

Everything that a caller needs to run any method on a whole tensor or on parts of it is here: `parameters_of` and
`check_parameters` before any work, `survey_for` for a first pass over the data, `merge_part`, and `merge_tensor`, which
is all of them on one tensor.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol, get_args, get_origin, get_type_hints, overload

import torch

from quantlab.errors import InputError
from quantlab.merging.methods.noise import Noise

PerModel = Sequence[float]  # annotation of a parameter that every merged model has its own value of


@dataclass(frozen=True)
class Between:
    """The closed range that a parameter's values lie in: `Annotated[float, Between(0, 1)]`."""

    least: float = -math.inf
    most: float = math.inf


Share = Annotated[float, Between(0, 1)]
SharePerModel = Annotated[PerModel, Between(0, 1)]

NOT_PARAMETERS = ("survey", "offset", "noise", "grams")  # keyword-only names that a method receives, not the user gives


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED = _Required()


class Each(Sequence[float]):
    """A default of a per-model parameter: the same value for however many models there are."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __iter__(self) -> Iterator[float]:
        return itertools.repeat(self.value)

    def __len__(self) -> int:
        raise TypeError("the same value for any number of models")

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[float]: ...
    def __getitem__(self, index: int | slice) -> float | Sequence[float]:
        assert isinstance(index, int)
        return self.value


def each(value: float) -> PerModel:
    """`value` for every model, as the default of a parameter annotated PerModel."""
    return Each(value)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, as its signature declares it.

    Attributes:
        name: as users write it (`lambda`, where Python's name is `lambda_`).
        per_model: whether every merged model has its own value.
        kind: `float`, `int`, `bool`, or the strings to choose from.
        default: of one model if `per_model`; `REQUIRED` where there is none.
        range: what numbers may be, ends included.
    """

    name: str
    per_model: bool
    kind: type[float] | type[int] | type[bool] | tuple[str, ...]
    default: Any
    range: Between = field(default_factory=Between)


class Survey(Protocol):
    """A first look at a tensor (or at all of them) that merging its parts depends on.

    The caller goes over the data `passes` times. In each pass `add` sees every part once, in ascending order, from one
    thread at a time; then `end_pass` is called. `result` is what `merge` receives as `survey`: it depends on the data
    alone, not on how the data was cut. The one exception is `survey_parts`: where several elements are equal in
    magnitude to the one at a threshold, the first of them in the tensor are kept, and a survey remembers how many came
    before only at the starts of its own parts. So merge parts that start where parts of the survey started.
    """

    passes: int

    def add(self, base: torch.Tensor | None, tensors: Sequence[torch.Tensor]) -> None: ...

    def end_pass(self) -> None: ...

    def result(self) -> Any: ...


def always(parameters: Mapping[str, Any]) -> bool:
    """Equal inputs come out as they are, whatever the parameters."""
    return True


@dataclass(frozen=True)
class MergeMethod:
    """One row of the table.

    Attributes:
        merge: pure: merge(base, tensors, *, parameters...) -> fp32 tensor of the inputs' shape. Inputs are fp32 on the
            CPU and are not changed. Its keyword-only arguments are the method's parameters, but for `survey` (what one
            found), `offset` (index of the part's first element in the flattened tensor), `noise` (model index, first
            and last element of the flattened part -> uniform numbers) and `grams`.
        grain: the smallest part of a tensor on which `merge` gives what it gives on the whole: any elements, whole rows
            (a vector is one row) or the tensor.
        base: whether `merge` needs a base; a method that leaves it unused gets None.
        models: fewest and most merged models, the base not counted; None for no bound.
        source: the paper (arXiv number), or where the definition is from.
        workspace: how many fp32 copies of one input part `merge` holds at its peak, its result among them, the inputs
            not; a function of the part's shape where it depends on that (`copies`). Scratch of a fixed size (some MB)
            is not counted.
        survey: makes the survey from those parameters that its signature names; None where `merge` needs none.
        survey_scope: whether a survey sees one tensor or all tensors that are merged, one after the other.
        keeps_equal: whether inputs that are all equal (the base too, unless it is unused) come out unchanged with these
            parameters, so that a caller may copy bytes.
        outside_layers: defaults of parameters for embeddings, heads and other tensors outside the layers, where those
            are not the signature's.
        check: raises InputError where parameters, each right by itself, do not go together; takes those that it names.
    """

    merge: Callable[..., torch.Tensor]
    grain: Literal["element", "row", "tensor"]
    base: Literal["required", "optional", "unused"]
    models: tuple[int, int | None]
    source: str
    workspace: float | Callable[[tuple[int, ...]], float]
    survey: Callable[..., Survey] | None = None
    survey_scope: Literal["tensor", "model"] | Callable[[Mapping[str, Any]], Literal["tensor", "model"]] = "tensor"
    keeps_equal: Callable[[Mapping[str, Any]], bool] = always
    check: Callable[..., None] | None = None
    outside_layers: Mapping[str, Any] = field(default_factory=dict)

    def scope(self, parameters: Mapping[str, Any]) -> Literal["tensor", "model"]:
        """What a survey with these parameters goes over."""
        return self.survey_scope(parameters) if callable(self.survey_scope) else self.survey_scope

    def copies(self, shape: tuple[int, ...]) -> float:
        """The workspace for a part of this shape, in fp32 copies of it."""
        return self.workspace(shape) if callable(self.workspace) else self.workspace


def parameters_of(method: MergeMethod) -> dict[str, Parameter]:
    """A method's parameters by name, in the order of its signature."""
    return dict(_schema(method.merge))


@functools.cache
def _schema(merge: Callable[..., torch.Tensor]) -> dict[str, Parameter]:
    hints = get_type_hints(merge, include_extras=True)
    found = {}
    for argument in inspect.signature(merge).parameters.values():
        if argument.kind is argument.KEYWORD_ONLY and argument.name not in NOT_PARAMETERS:
            default = REQUIRED if argument.default is argument.empty else argument.default
            parameter = _parameter(argument.name.rstrip("_"), hints[argument.name], default)
            found[parameter.name] = parameter
    return found


def _parameter(name: str, hint: Any, default: Any) -> Parameter:
    between = Between()
    if get_origin(hint) is Annotated:
        hint, between = get_args(hint)
    default = default.value if isinstance(default, Each) else default
    if get_origin(hint) is Literal:
        return Parameter(name, False, get_args(hint), default, between)
    if hint == PerModel:
        return Parameter(name, True, float, default, between)
    assert hint in (float, int, bool), f"{name}: {hint} declares no parameter"
    return Parameter(name, False, hint, default, between)


def check_parameters(method: MergeMethod, parameters: Mapping[str, Any], models: int) -> None:
    """Find what is wrong with the parameters of a merge of `models` models.

    Raises:
        InputError: too few or too many models, a name that the method does not have, one that it needs and does not
            get, a value of another kind, not finite or out of range, not one value for each model, or values that do
            not go together.
    """
    fewest, most = method.models
    if models < fewest or (most is not None and models > most):
        wanted = f"{fewest}" if most == fewest else f"{fewest} or more" if most is None else f"{fewest} to {most}"
        raise InputError(f"{models} models to merge: this method takes {wanted}, the base not counted")
    schema = _schema(method.merge)
    for name in parameters:
        if name not in schema:
            near = difflib.get_close_matches(str(name), schema, 1)
            known = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(schema) or 'none'}"
            raise InputError(f"parameter {name!r}: this method has none of that name; {known}")
    for parameter in schema.values():
        if parameter.name not in parameters:
            if parameter.default is REQUIRED:
                raise InputError(f"parameter {parameter.name!r} is missing: it has no default")
            continue
        _check_value(parameter, parameters[parameter.name], models)
    if method.check is not None:
        method.check(**_named(method.check, arguments_of(method, parameters, models)))


def _check_value(parameter: Parameter, given: Any, models: int) -> None:
    name = parameter.name
    is_list = isinstance(given, Sequence) and not isinstance(given, (str, bytes))
    if parameter.per_model and not (is_list and len(given) == models):
        raise InputError(f"parameter {name!r}: {given!r} is not one number for each of {models} models")
    for value in given if parameter.per_model else (given,):
        if isinstance(parameter.kind, tuple):
            if value not in parameter.kind:
                raise InputError(f"parameter {name!r}: {value!r} is none of {', '.join(parameter.kind)}")
        elif parameter.kind is bool:
            if not isinstance(value, bool):
                raise InputError(f"parameter {name!r}: {value!r} is neither true nor false")
        else:
            _check_number(parameter, value)


def _check_number(parameter: Parameter, value: Any) -> None:
    kinds = (int,) if parameter.kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
        wanted = "a whole number" if parameter.kind is int else "a finite number"
        raise InputError(f"parameter {parameter.name!r}: {value!r} is not {wanted}")
    least, most = parameter.range.least, parameter.range.most
    if not least <= value <= most:
        wanted = f"from {least:g} to {most:g}" if math.isfinite(most) else f"at least {least:g}"
        raise InputError(f"parameter {parameter.name!r}: {value!r} is out of range; it is {wanted}")


def arguments_of(method: MergeMethod, parameters: Mapping[str, Any], models: int) -> dict[str, Any]:
    """All parameters under their Python names, defaults filled in, per-model ones as tuples of `models` values."""
    found = {}
    for name, parameter in _schema(method.merge).items():
        value = parameters.get(name, parameter.default)
        if parameter.per_model:
            value = (value,) * models if name not in parameters else tuple(value)
        found[_python_name(method.merge, name)] = value
    return found


def _python_name(function: Callable[..., Any], name: str) -> str:
    return name if name in _names(function) else f"{name}_"


@functools.cache
def _names(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _named(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    names = _names(function)
    return {name: value for name, value in arguments.items() if name in names}


def survey_for(method: MergeMethod, parameters: Mapping[str, Any], models: int) -> Survey | None:
    """A new survey for a merge with these parameters, None where the method needs none."""
    if method.survey is None:
        return None
    return method.survey(**_named(method.survey, arguments_of(method, parameters, models)))


def merge_part(
    method: MergeMethod,
    base: torch.Tensor | None,
    tensors: Sequence[torch.Tensor],
    parameters: Mapping[str, Any],
    *,
    survey: Any = None,
    offset: int = 0,
    noise: Noise | None = None,
    grams: Sequence[torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """Merge one part of a tensor; the parts' results, one after the other, are bit for bit the whole's.

    Args:
        method: a row of the table.
        base: the base's part, fp32 and contiguous; None where there is none.
        tensors: the models' parts, of the same shape.
        parameters: by the users' names, checked by `check_parameters`; per-model ones are sequences.
        survey: the result of `survey_for`'s survey over the whole tensor.
        offset: index of the part's first element in the flattened tensor.
        noise: the tensor's noise, for methods that draw.
        grams: per model, the second moment of the inputs of this weight [in, in], for methods that use it.
    """
    special = {"survey": survey, "offset": offset, "grams": grams}
    if noise is not None:
        special["noise"] = noise.part(offset)
    arguments = arguments_of(method, parameters, len(tensors))
    return method.merge(
        None if method.base == "unused" else base, tensors, **arguments, **_named(method.merge, special)
    )


def merge_tensor(
    method: MergeMethod,
    base: torch.Tensor | None,
    tensors: Sequence[torch.Tensor],
    parameters: Mapping[str, Any],
    *,
    noise: Noise | None = None,
    grams: Sequence[torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """Merge one whole tensor: check, survey, merge. A survey of scope "model" sees this tensor alone.

    Raises:
        InputError: wrong parameters (`check_parameters`), or a base missing where the method needs one.
    """
    check_parameters(method, parameters, len(tensors))
    if base is None and method.base == "required":
        raise InputError("this method merges differences from a base model; name one as base_model")
    survey = survey_for(method, parameters, len(tensors))
    if survey is not None:
        for _ in range(survey.passes):
            survey.add(None if method.base == "unused" else base, tensors)
            survey.end_pass()
    result = None if survey is None else survey.result()
    return merge_part(method, base, tensors, parameters, survey=result, noise=noise, grams=grams)
