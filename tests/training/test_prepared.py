"""Files to samples, as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_tokenizers import CHATML, PLAIN, THOUGHTS

from quantlab import InputError, load_tokenizer
from quantlab.checkpoint.tokenizer import Tokenizer
from quantlab.training.prepared import DataSettings, prepare_data

FABLE = Path(__file__).parents[2] / "models" / "fable-9m"
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
SETTINGS = DataSettings(context=64)


@pytest.fixture(scope="module")
def fable() -> Tokenizer:
    return load_tokenizer(FABLE)


def write(file: Path, *rows: object) -> Path:
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def numbered(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"Number {n}", "completion": " it is."} for n in range(count)]


def test_a_folder_in_the_order_of_its_rows(fable, tmp_path) -> None:
    write(tmp_path / "train.jsonl", *numbered(3), {"text": "It rained. " * 40})
    write(tmp_path / "valid.jsonl", CHAT)
    write(tmp_path / "test.txt", "It was late.")
    write(tmp_path / "old.jsonl", CHAT)
    data = prepare_data(tmp_path, fable, CHATML, SETTINGS)
    places = [sample.place for sample in data.train]
    assert places[:4] == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:3", "train.jsonl:4"]
    assert set(places[3:]) == {"train.jsonl:4"}
    assert len(places) > 4  # windows
    assert fable.decode(data.train[1].input_ids) == "Number 1 it is."
    assert [s.place for s in data.valid + data.test] == ["valid.jsonl:1", "test.txt:document 1"]
    assert data.notes[0] == f"{tmp_path}: old.jsonl is not used"


def test_the_digest_tells_data_apart(fable, tmp_path) -> None:
    file = write(tmp_path / "d.jsonl", *numbered(4))
    digest = prepare_data(file, fable, None, SETTINGS).digest
    assert prepare_data(write(tmp_path / "e.jsonl", *numbered(4)), fable, None, SETTINGS).digest == digest
    others = [
        prepare_data(file, fable, None, DataSettings(64, completion_only=False)).digest,
        prepare_data(file, fable, None, DataSettings(64, held_out=1)).digest,
        prepare_data(write(tmp_path / "e.jsonl", *numbered(4)[::-1]), fable, None, SETTINGS).digest,
    ]
    assert len({digest, *others}) == 4


def test_all_bad_rows_of_all_files_in_one_line(fable, tmp_path) -> None:
    """What a row is, what the template makes of it, and what the tokenizer can encode."""
    odd = {"messages": [{"role": "assistant", "content": "Hello."}]}
    surrogate = '{"prompt": "\\ud800", "completion": "a"}\n'
    write(tmp_path / "train.jsonl", *numbered(1), "{\n", odd, surrogate)
    write(tmp_path / "test.jsonl", {"prompt": "a", "completion": ""})
    template = "{% if not messages %}{{ raise_exception('no question') }}{% endif %}" + CHATML
    with pytest.raises(InputError) as error:
        prepare_data(tmp_path, fable, template, SETTINGS)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}: 4 bad rows: train.jsonl:2: no JSON (")
    assert 'test.jsonl:1: "completion" is empty; ' in message
    assert "train.jsonl:3: the model's chat template fails on these messages: no question; " in message
    assert "train.jsonl:4: the model's tokenizer fails on this text" in message


def test_ten_bad_rows_are_shown(fable, tmp_path) -> None:
    file = write(tmp_path / "d.jsonl", *["{" + "x" * 300 + "\n"] * 12)
    with pytest.raises(InputError, match=r"12 bad rows: .*d.jsonl:10: no JSON .*; and 2 more$"):
        prepare_data(file, fable, None, SETTINGS)


def test_rows_held_out_of_a_file(fable, tmp_path) -> None:
    data = prepare_data(write(tmp_path / "d.jsonl", *numbered(10)), fable, None, DataSettings(64, held_out=0.2, seed=5))
    assert (len(data.train), len(data.valid), data.test) == (8, 2, [])
    assert not {s.place for s in data.train} & {s.place for s in data.valid}
    write(tmp_path / "train.jsonl", *numbered(3))
    write(tmp_path / "valid.jsonl", *numbered(3))
    with pytest.raises(InputError, match=r"has valid.jsonl to evaluate on"):
        prepare_data(tmp_path, fable, None, DataSettings(64, held_out=1))


def test_turns_of_one_conversation_stay_together(fable, tmp_path) -> None:
    """Although each is a sample: the others would give it away."""
    turns = [("user", "1+1?"), ("assistant", "<think>hm</think>2"), ("user", "2+2?"), ("assistant", "4")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    data = prepare_data(write(tmp_path / "d.jsonl", *[row] * 4), fable, THOUGHTS, DataSettings(128, held_out=1))
    assert (len(data.train), len(data.valid)) == (6, 2)
    assert len({s.place for s in data.valid}) == 1
    assert any(note.startswith("4 conversations became a sample for every turn") for note in data.notes)


def test_the_last_windows_of_a_text_are_held_out(fable, tmp_path) -> None:
    file = tmp_path / "d.txt"
    file.write_text("The rain fell on the old town. " * 60, encoding="utf-8")
    whole = prepare_data(file, fable, None, SETTINGS)
    parted = prepare_data(file, fable, None, DataSettings(64, held_out=0.25))
    assert parted.train + parted.valid == whole.train
    assert len(parted.valid) == round(len(whole.train) / 4)


def test_what_is_trained_on_and_evaluated_too_is_told(fable, tmp_path) -> None:
    write(tmp_path / "train.jsonl", *numbered(3))
    write(tmp_path / "valid.jsonl", *numbered(5)[2:])
    assert prepare_data(tmp_path, fable, None, SETTINGS).notes == [
        "1 of 3 valid samples are among the training samples too"
    ]


def test_long_rows_of_all_files_in_one_error(fable, tmp_path) -> None:
    long = {"prompt": "a", "completion": " long" * 80}
    write(tmp_path / "train.jsonl", *numbered(1), long)
    write(tmp_path / "test.jsonl", long)
    with pytest.raises(InputError, match=r"2 samples longer than .* 64 tokens: train.jsonl:2 \(\d+\), test.jsonl:1"):
        prepare_data(tmp_path, fable, None, SETTINGS)
    with pytest.raises(InputError, match=r"nothing is left of the test rows: none fits into 64 tokens"):
        prepare_data(tmp_path, fable, None, DataSettings(64, too_long="skip"))


def test_conversations_need_a_template(fable, tmp_path) -> None:
    file = write(tmp_path / "d.jsonl", CHAT)
    with pytest.raises(InputError, match=r"d.jsonl:1: .* no chat template; give a file with one"):
        prepare_data(file, fable, None, SETTINGS)
    with pytest.raises(InputError, match="no template that Jinja reads"):
        prepare_data(file, fable, "{% for", SETTINGS)


def test_notes_of_the_template_are_handed_on(fable, tmp_path) -> None:
    (note,) = prepare_data(write(tmp_path / "d.jsonl", CHAT), fable, PLAIN, SETTINGS).notes
    assert note.endswith("the end token </s> is added")


def test_progress_counts_rows_of_all_files(fable, tmp_path) -> None:
    write(tmp_path / "train.jsonl", *numbered(2))
    write(tmp_path / "test.jsonl", *numbered(1))
    reports: list[tuple[int, int, str]] = []
    prepare_data(tmp_path, fable, None, SETTINGS, progress=lambda *report: reports.append(report))
    assert reports == [(1, 3, "train.jsonl:1"), (2, 3, "train.jsonl:2"), (3, 3, "test.jsonl:1")]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"context": 1}, "at least 2 are needed"),
        ({"too_long": "drop"}, "choose from error, cut, skip"),
        ({"held_out": -1}, "a share below 1, or a number"),
        ({"held_out": 2.5}, "a share below 1, or a number"),
        ({"held_out": float("nan")}, "a share below 1, or a number"),
    ],
)
def test_settings_out_of_range(settings, reason) -> None:
    with pytest.raises(InputError, match=reason):
        DataSettings(**{"context": 64, **settings})
