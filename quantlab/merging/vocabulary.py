"""Models whose tokens differ: whose rows of embedding and head stand for which token of the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.source import is_gguf
from quantlab.checkpoint.tokenizer import Tokenizer, holds_tokenizer, load_tokenizer
from quantlab.merging.config import TokenizerSettings, TokenSource
from quantlab.merging.faults import Faults, nearest
from quantlab.merging.plan_types import MergedVocabulary, OpenedModel, Part, RowOverride
from quantlab.merging.references import ModelReference
from quantlab.merging.united_tokenizer import united_tokenizer

_WAYS_OUT = "say whose tokens the output has: tokenizer: {source: union}, or base, or one of the models"


@dataclass(frozen=True)
class Alignment:
    """How rows of the vocabulary's tensors go together.

    Attributes:
        count: rows of the output's embedding; None: as they lie, the same number in all models.
        rows: by model, which of its rows each output row is, -1 for none; nothing where rows lie as they are.
        companions: whose tokenizer the output has, or begins with.
        vocabulary: of the output, where rows move.
        tokens: output row, origin and row there of tokens whose rows the config takes from one place.
        is_united: the vocabulary's tokenizer is a new one, no model's own.
        is_refused: tokens do not go together, and faults say so.
        known: ids by token of the output; None where no model has a tokenizer.
    """

    companions: ModelReference
    count: int | None = None
    rows: Mapping[ModelReference, tuple[int, ...]] = field(default_factory=dict)
    vocabulary: MergedVocabulary | None = None
    tokens: tuple[tuple[int, TokenSource, int], ...] = ()
    is_united: bool = False
    is_refused: bool = False
    known: Mapping[str, int] | None = None

    def overrides(self, tensors: Mapping[ModelReference, str]) -> tuple[RowOverride, ...]:
        """The rows from one place of one output tensor, given that tensor's name in every model."""
        return tuple(
            RowOverride(
                row,
                None if source.model is None else Part(source.model, tensors[source.model]),
                source_row,
                source.force,
            )
            for row, source, source_row in self.tokens
        )


def align(
    models: Sequence[ModelReference],
    base: ModelReference | None,
    settings: TokenizerSettings | None,
    opened: Mapping[ModelReference, OpenedModel],
    faults: Faults,
    notes: list[str],
) -> Alignment:
    """Match the models' vocabularies.

    Args:
        models: those that are merged and the base of deltas, each once.
        base: the config's base model.
        settings: None: all must have the same tokens.
    """
    first = base or models[0]
    companions = settings.source if settings and isinstance(settings.source, ModelReference) else first
    involved = list(dict.fromkeys([companions, *models]))
    if settings is not None:
        involved += [each.model for each in settings.tokens.values() if each.model and each.model not in involved]
    tokenizers = {reference: tokenizer_of(opened[reference].checkpoint) for reference in involved}
    ids = {
        reference: tokenizer.backend.get_vocab(with_added_tokens=True)
        for reference, tokenizer in tokenizers.items()
        if tokenizer is not None
    }
    without = [reference for reference in involved if reference not in ids]
    if settings is None:
        if without and ids:
            companions = next(reference for reference in involved if reference in ids)
            notes.append(f"without a tokenizer, and taken to have {companions}'s tokens: {_listed(without)}")
        is_same = _check_same(involved, models, ids, companions, opened, faults)
        _note_ends(companions, tokenizers, ids, notes)
        return Alignment(companions, is_refused=not is_same, known=ids.get(companions))
    if without:
        faults.add(f"without a tokenizer: {_listed(without)}", "copy it from the model that it was made of")
        return Alignment(companions, is_refused=True)
    _note_ends(companions, tokenizers, ids, notes)
    return _Matching(settings, models, companions, ids, tokenizers, opened, faults, notes).alignment()


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer | None:
    """A model's tokenizer; None if it has none.

    Raises:
        InputError: it has a broken one.
    """
    if is_gguf(checkpoint.path):
        from quantlab.checkpoint.gguf_file import GgufFile
        from quantlab.checkpoint.gguf_tokenizer import HUGGINGFACE_JSON, KIND, NO_VOCABULARY

        metadata = GgufFile(checkpoint.path).metadata
        if metadata.get(KIND, NO_VOCABULARY[0]) in NO_VOCABULARY and HUGGINGFACE_JSON not in metadata:
            return None
    elif not holds_tokenizer(checkpoint.path):
        return None
    return load_tokenizer(checkpoint.path)


def _listed(models: Sequence[ModelReference]) -> str:
    return ", ".join(map(str, models))


def _check_same(
    involved: Sequence[ModelReference],
    models: Sequence[ModelReference],
    ids: Mapping[ModelReference, Mapping[str, int]],
    companions: ModelReference,
    opened: Mapping[ModelReference, OpenedModel],
    faults: Faults,
) -> bool:
    others = [each for each in involved if each in ids and ids[each] != ids[companions]]
    for other in others:
        difference = _difference(ids[companions], ids[other])
        faults.add(f"{companions} and {other} have different tokens ({difference})", _WAYS_OUT)
    alike = [each for each in models if each in ids and each not in others]
    rows = {each: opened[each].shape(opened[each].family.embedding)[0] for each in alike}
    if len(set(rows.values())) > 1:
        listed = ", ".join(f"{count} in {reference}" for reference, count in rows.items())
        faults.add(f"embeddings of the same tokens have other numbers of rows: {listed}", _WAYS_OUT)
    return not others and len(set(rows.values())) <= 1


def _note_ends(
    companions: ModelReference,
    tokenizers: Mapping[ModelReference, Tokenizer | None],
    ids: Mapping[ModelReference, Mapping[str, int]],
    notes: list[str],
) -> None:
    """Say where models end their texts with other tokens than the output will: chats break by that."""
    ends = {
        model: " or ".join(sorted(token for token, number in ids[model].items() if number in tokenizer.eos))
        for model, tokenizer in tokenizers.items()
        if tokenizer is not None and tokenizer.eos
    }
    for model, end in ends.items():
        if end and ends.get(companions) and end != ends[companions]:
            notes.append(f"{model} ends texts with {end}; the output, as {companions}, with {ends[companions]}")


def _difference(one: Mapping[str, int], other: Mapping[str, int]) -> str:
    """The first token that differs, and how many are in one only."""
    by_id = {number: token for token, number in other.items()}
    moved = next(
        ((n, token) for token, n in sorted(one.items(), key=lambda item: item[1]) if by_id.get(n, token) != token), None
    )
    counts = f"{len(one.keys() - other.keys())} only in the first, {len(other.keys() - one.keys())} only in the second"
    if moved is None:
        return counts
    return f"{moved[0]} is {moved[1]!r} in the first and {by_id[moved[0]]!r} in the second; {counts}"


class _Matching:
    """The rows of every model by the output's tokens."""

    def __init__(
        self,
        settings: TokenizerSettings,
        models: Sequence[ModelReference],
        companions: ModelReference,
        ids: Mapping[ModelReference, Mapping[str, int]],
        tokenizers: Mapping[ModelReference, Tokenizer | None],
        opened: Mapping[ModelReference, OpenedModel],
        faults: Faults,
        notes: list[str],
    ) -> None:
        self._settings, self._models, self._companions = settings, models, companions
        self._ids, self._tokenizers, self._opened = ids, tokenizers, opened
        self._faults, self._notes = faults, notes

    def alignment(self) -> Alignment:
        index, tokenizer = self._output_tokens()
        tokens: list[str | None] = [None] * (max(index.values(), default=-1) + 1)
        for token, number in index.items():
            tokens[number] = token
        own_rows = self._rows_of(self._companions)
        if self._settings.source != "union" or index == self._ids[self._companions]:
            tokens += [None] * (own_rows - len(tokens))  # rows behind the last token stay
        tokens += [None] * (-len(tokens) % self._settings.multiple)
        rows = {model: self._matched(model, index, tokens) for model in self._models}
        overrides = self._overrides(index)
        as_they_lie = all(found == tuple(range(self._rows_of(model))) for model, found in rows.items())
        if as_they_lie and not overrides:
            return Alignment(self._companions, known=index)
        self._note_fillings(rows, index)
        vocabulary = MergedVocabulary(tuple(tokens), tokenizer)
        is_united = index != self._ids[self._companions]
        return Alignment(self._companions, len(tokens), rows, vocabulary, overrides, is_united, known=index)

    def _rows_of(self, model: ModelReference) -> int:
        opened = self._opened[model]
        return opened.shape(opened.family.embedding)[0]

    def _output_tokens(self) -> tuple[Mapping[str, int], str]:
        """Ids by token of the output, and its tokenizer.json."""
        own = self._tokenizers[self._companions]
        assert own is not None
        if self._settings.source != "union":
            return self._ids[self._companions], own.backend.to_str()
        others = [self._tokenizers[model] for model in self._models if model != self._companions]
        names = [str(model) for model in self._models if model != self._companions]
        united = united_tokenizer(
            own, [each for each in others if each is not None], (str(self._companions), *names), self._faults
        )
        return united.ids, united.text

    def _matched(
        self, model: ModelReference, index: Mapping[str, int], tokens: Sequence[str | None]
    ) -> tuple[int, ...]:
        ids, count = self._ids[model], self._rows_of(model)
        if missing := [token for token, number in ids.items() if number >= count]:
            way_out = "its tokenizer is not the model's own: replace it"
            example = min(missing, key=ids.__getitem__)
            self._faults.add(f"{model}: {len(missing)} tokens have no row, such as {example!r}", way_out)
        has_same_ids = ids == index  # then rows that belong to no token lie at the same places
        found = []
        for row, token in enumerate(tokens):
            number = (row if has_same_ids else -1) if token is None else ids.get(token, -1)
            found.append(number if number < count else -1)
        return tuple(found)

    def _overrides(self, index: Mapping[str, int]) -> tuple[tuple[int, TokenSource, int], ...]:
        found = []
        for token, source in self._settings.tokens.items():
            if token not in index:
                self._faults.add(f"tokenizer.tokens: the output has no token {token!r}", _nearest_token(token, index))
                continue
            number = self._source_row(token, source)
            if number is not None:
                found.append((index[token], source, number))
        return tuple(sorted(found, key=lambda item: item[0]))

    def _source_row(self, token: str, source: TokenSource) -> int | None:
        """The row of the token's origin; -1 for zeros, None where there is none."""
        if source.model is None:
            return -1
        wanted = token if source.token is None else source.token
        if isinstance(wanted, int):
            if 0 <= wanted < self._rows_of(source.model):
                return wanted
        elif wanted in self._ids[source.model]:
            return self._ids[source.model][wanted]
        hint = "" if isinstance(wanted, int) else _nearest_token(wanted, self._ids[source.model])
        self._faults.add(f"tokenizer.tokens: {token!r}: {source.model} has no token {wanted!r}", hint)
        return None

    def _note_fillings(self, rows: Mapping[ModelReference, tuple[int, ...]], index: Mapping[str, int]) -> None:
        for model, found in rows.items():
            missing = sum(found[number] < 0 for number in index.values())
            if missing:
                self._notes.append(f"{missing} of {len(index)} tokens are not {model}'s; others' rows stand for them")
            dropped = len(self._ids[model].keys() - index.keys())
            if dropped:
                self._notes.append(f"{dropped} tokens of {model} are not in the output")


def _nearest_token(token: str, known: Mapping[str, int]) -> str:
    if len(known) > 1000:
        return "write it as tokenizer.json does"
    hint = nearest(token, known)
    return hint if hint.startswith("did") else "write it as tokenizer.json does"
