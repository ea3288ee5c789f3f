"""Models of different tokens: whose rows stand for what, and the tokenizer of the output."""

import json

import pytest
from merge_models import LETTERS, WIDTH, by_name, llama, planned, tokenizer_json
from tokenizers import Tokenizer

from quantlab.merging.faults import MergeError
from quantlab.merging.plan_types import Part, RowOverride
from quantlab.merging.references import ModelReference

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OTHER = ("<s>", "</s>", "c", "b", "a", "x")  # three letters elsewhere, one new, three missing


def config(*folders, method="linear", **keys):
    listed = "".join(f"- model: {folder}\n" for folder in folders)
    more = "".join(f"{key}: {value}\n" for key, value in keys.items())
    return f"models:\n{listed}merge_method: {method}\nparameters: {{weight: 0.5}}\n{more}"


def faults_of(text):
    with pytest.raises(MergeError) as caught:
        planned(text)
    return list(caught.value.faults)


def rows(plan, name=EMBEDDING):
    return {part.model: part.rows for part in by_name(plan)[name].parts}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "plain": llama(root / "plain", seed=1),
        "chat": llama(root / "chat", added=("<|im_start|>", "<|im_end|>"), seed=2),
        "other": llama(root / "other", tokens=OTHER, seed=3),
        "padded": llama(root / "padded", rows=16, seed=4),
        "bare": llama(root / "bare", tokens=None, seed=5),
    }


def reference(folder):
    return ModelReference(str(folder))


# ---- without a word on tokenizers


def test_different_tokens_are_refused_with_what_differs(folders):
    plain, chat, other = folders["plain"], folders["chat"], folders["other"]
    faults = faults_of(config(plain, chat, other))
    assert len(faults) == 2
    way_out = "say whose tokens the output has: tokenizer: {source: union}, or base, or one of the models"
    assert faults[0] == (
        f"{plain} and {chat} have different tokens (0 only in the first, 2 only in the second); {way_out}"
    )
    assert faults[1] == (
        f"{plain} and {other} have different tokens (2 is 'a' in the first and 'c' in the second; "
        f"3 only in the first, 1 only in the second); {way_out}"
    )


def test_other_numbers_of_rows_are_refused(folders):
    (fault,) = faults_of(config(folders["plain"], folders["padded"]))
    assert fault.startswith("embeddings of the same tokens have other numbers of rows: 8 in ")
    assert "tokenizer: {source: union}" in fault


def test_models_without_a_tokenizer_are_taken_on_trust(folders):
    plan = planned(config(folders["bare"], folders["plain"]))
    assert plan.companions == reference(folders["plain"])
    assert plan.notes == (f"without a tokenizer, and taken to have {folders['plain']}'s tokens: {folders['bare']}",)
    assert planned(config(folders["bare"], folders["bare"])).notes == ()


def test_other_end_tokens_are_noted(tmp_path, folders):
    chat = llama(tmp_path / "chat", added=("<|im_start|>", "<|im_end|>"), eos_token_id=[1, 9])
    plan = planned(config(folders["chat"], chat))
    assert plan.notes == (f"{chat} ends texts with </s> or <|im_end|>; the output, as {folders['chat']}, with </s>",)
    odd = llama(tmp_path / "odd", eos_token_id=[-1, 1 << 70])
    assert planned(config(folders["plain"], odd)).notes == ()


# ---- whose rows


def test_equal_tokens_stay_as_they_lie(folders):
    for source in ("union", "base"):
        plan = planned(config(folders["plain"], folders["plain"], tokenizer=f"{{source: {source}}}"))
        assert plan.vocabulary is None
        assert set(rows(plan).values()) == {None}


def test_union(folders):
    chat, other = folders["chat"], folders["other"]
    plan = planned(config(chat, other, tokenizer="{source: union}"))
    tokens = (*LETTERS, "<|im_start|>", "<|im_end|>", "x")
    assert plan.vocabulary.tokens == tokens
    assert rows(plan) == {
        reference(chat): (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, -1),
        reference(other): (0, 1, 4, 3, 2, -1, -1, -1, -1, -1, 5),
    }
    assert rows(plan, HEAD) == rows(plan)
    assert by_name(plan)[HEAD].shape == (11, WIDTH)
    assert plan.config["vocab_size"] == 11
    assert plan.companions == reference(chat)
    assert set(plan.notes) == {
        f"1 of 11 tokens are not {chat}'s; others' rows stand for them",
        f"5 of 11 tokens are not {other}'s; others' rows stand for them",
    }


def test_the_first_or_the_base_gives_the_ids(folders):
    chat, other = folders["chat"], folders["other"]
    plan = planned(config(chat, other, tokenizer="{source: union}", base_model=other))
    assert plan.vocabulary.tokens == (*OTHER, "d", "e", "f", "<|im_start|>", "<|im_end|>")


def test_the_bases_tokens(folders):
    chat, plain = folders["chat"], folders["plain"]
    for source in ("base", plain):
        plan = planned(config(chat, plain, tokenizer=f"{{source: {source}}}", base_model=plain))
        assert plan.vocabulary.tokens == LETTERS
        assert rows(plan) == {reference(chat): tuple(range(8)), reference(plain): tuple(range(8))}
        assert plan.companions == reference(plain)
        assert plan.files == {}
        assert plan.notes == (f"2 tokens of {chat} are not in the output",)


def test_the_tokens_of_a_model_that_is_not_merged(folders):
    plan = planned(config(folders["plain"], tokenizer=f"{{source: {folders['other']}}}"))
    assert rows(plan) == {reference(folders["plain"]): (0, 1, 4, 3, 2, -1)}
    assert plan.companions == reference(folders["other"])


def test_rows_behind_the_last_token_stay_where_vocabularies_agree(folders):
    padded, plain = folders["padded"], folders["plain"]
    plan = planned(config(padded, plain, tokenizer="{source: base}"))
    assert by_name(plan)[EMBEDDING].shape == (16, WIDTH)
    assert rows(plan) == {reference(padded): tuple(range(16)), reference(plain): (*range(8), *[-1] * 8)}
    assert plan.vocabulary.tokens == (*LETTERS, *[None] * 8)


def test_padding_to_a_multiple(folders):
    plan = planned(config(folders["plain"], tokenizer="{source: union, pad_to_multiple_of: 6}"))
    assert rows(plan) == {reference(folders["plain"]): (*range(8), *[-1] * 4)}
    assert plan.config["vocab_size"] == 12


def test_deltas_match_the_bases_rows_too(folders):
    plain, chat = folders["plain"], folders["chat"]
    text = config(chat, method="task_arithmetic", base_model=plain, tokenizer="{source: union}")
    tensor = by_name(planned(text))[EMBEDDING]
    assert tensor.base == Part(reference(plain), EMBEDDING, (*range(8), -1, -1))
    assert tensor.parts == (Part(reference(chat), EMBEDDING, tuple(range(10))),)


def test_a_tied_models_rows_stand_in_the_head_too(tmp_path, folders):
    tied = llama(tmp_path / "tied", tied=True, added=("<x>",))
    tensor = by_name(planned(config(tied, folders["plain"], tokenizer="{source: union}")))[HEAD]
    assert tensor.parts[0] == Part(reference(tied), EMBEDDING, tuple(range(9)))


def test_special_ids_are_those_of_the_companions(tmp_path, folders):
    other = llama(tmp_path / "special", tokens=("a", "b", "<s>", "</s>"), bos_token_id=2, eos_token_id=3)
    plan = planned(config(folders["plain"], other, tokenizer=f"{{source: {other}}}"))
    assert (plan.config["bos_token_id"], plan.config["eos_token_id"]) == (2, 3)


def test_union_needs_tokenizers(folders):
    (fault,) = faults_of(config(folders["bare"], folders["plain"], tokenizer="{source: union}"))
    assert fault == f"without a tokenizer: {folders['bare']}; copy it from the model that it was made of"


def test_more_tokens_than_rows(tmp_path, folders):
    cut = llama(tmp_path / "cut", rows=6)
    (fault,) = faults_of(config(folders["plain"], cut, tokenizer="{source: union}"))
    assert fault == f"{cut}: 2 tokens have no row, such as 'e'; its tokenizer is not the model's own: replace it"


# ---- single tokens


def test_tokens_from_one_place(folders):
    chat, plain, other = folders["chat"], folders["plain"], folders["other"]
    tokens = "".join(
        (
            f"a: {{source: {other}, force: true}}, ",
            f"<|im_start|>: {{source: {{kind: model_token, model: {plain}, token: b}}}}, ",
            "<|im_end|>: {source: {kind: zero}}, ",
            f"c: {{source: {{kind: model_token, model: {plain}, token_id: 7}}}}",
        )
    )
    plan = planned(config(plain, chat, tokenizer=f"{{source: union, tokens: {{{tokens}}}}}"))
    for name in (EMBEDDING, HEAD):
        assert by_name(plan)[name].overrides == (
            RowOverride(2, Part(reference(other), name), 4, True),
            RowOverride(4, Part(reference(plain), name), 7, False),
            RowOverride(8, Part(reference(plain), name), 3, False),
            RowOverride(9, None, -1, False),
        )


def test_tokens_that_are_not_there(folders):
    chat, plain = folders["chat"], folders["plain"]
    tokens = f"{{<|im_strat|>: {{source: {chat}}}, <|im_end|>: {{source: {plain}}}}}"
    assert faults_of(config(plain, chat, tokenizer=f"{{source: union, tokens: {tokens}}}")) == [
        "tokenizer.tokens: the output has no token '<|im_strat|>'; did you mean <|im_start|>?",
        f"tokenizer.tokens: '<|im_end|>': {plain} has no token '<|im_end|>'; write it as tokenizer.json does",
    ]


# ---- the united tokenizer


def test_the_united_tokenizer_reads_all_tokens(folders):
    plan = planned(config(folders["chat"], folders["other"], tokenizer="{source: union}"))
    united = Tokenizer.from_str(plan.files["tokenizer.json"].decode())
    assert united.get_vocab(with_added_tokens=True) == {token: i for i, token in enumerate(plan.vocabulary.tokens)}
    assert united.encode("ax<|im_end|>f").ids == [2, 10, 9, 7]
    assert united.decode([8, 2, 3], skip_special_tokens=True).replace(" ", "") == "ab"
    assert json.loads(plan.files["tokenizer_config.json"])["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert plan.files["vocab.json"] is None


def test_merges_of_others_come_behind(tmp_path):
    one = llama(tmp_path / "one", tokens=(*LETTERS, "ab"), merges=[("a", "b")])
    two = llama(tmp_path / "two", tokens=(*LETTERS, "bc", "ab", "abc"), merges=[("b", "c"), ("a", "b"), ("ab", "c")])
    united = Tokenizer.from_str(planned(config(one, two, tokenizer="{source: union}")).files["tokenizer.json"].decode())
    assert united.encode("abc", add_special_tokens=False).tokens == ["abc"]
    assert united.encode("bcab", add_special_tokens=False).tokens == ["bc", "ab"]
    assert [json.loads(united.to_str())["model"]["merges"][0]] == [["a", "b"]]


def test_alphabets_that_differ_do_not_unite(tmp_path, folders):
    content = json.loads(tokenizer_json((*LETTERS, "g")))
    content["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    bytes_ = llama(tmp_path / "bytes", tokens=(*LETTERS, "g"))
    (bytes_ / "tokenizer.json").write_text(json.dumps(content))
    (fault,) = faults_of(config(folders["plain"], bytes_, tokenizer="{source: union}"))
    assert fault.startswith(f"{folders['plain']} and {bytes_} write tokens differently")
