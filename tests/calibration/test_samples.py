"""Calibration text to windows: cut at documents, drawn by the seed, and refused where it is none."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

from quantlab import InputError, load_tokenizer, open_checkpoint
from quantlab.calibration.samples import DEFAULT_TEXT, CalibrationRequest, CalibrationSamples, open_calibration
from quantlab.documents import DOCUMENT_END, read_documents

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'judge' %}{{ raise_exception('no judges') }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}\n"
    "{% endfor %}{{ eos_token }}"
)


def drawn(model: Path, text: Path | None = None, **options) -> CalibrationSamples:
    return open_calibration(open_checkpoint(model), CalibrationRequest(text, **options))


def refusal(model: Path, text: Path | None, **options) -> str:
    with pytest.raises(InputError) as error:
        drawn(model, text, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def written(folder: Path, *documents: str) -> Path:
    path = folder / "text.txt"
    path.write_text(f"\n{DOCUMENT_END}\n".join(documents), encoding="utf-8")
    return path


def test_windows_are_cut_within_documents_and_begin_with_the_start_token(llama_model, prose):
    samples = drawn(llama_model, prose, length=64, samples=10_000)
    tokenizer = load_tokenizer(llama_model)
    expected = set()
    for document in read_documents(prose):
        ids = tokenizer.encode(document, add_special_tokens=False)
        expected |= {(tokenizer.bos, *ids[i : i + 63]) for i in range(0, len(ids), 63) if len(ids) - i >= 7}
    assert set(samples.windows) == expected
    assert samples.tokens == sum(map(len, expected))
    assert samples.notes == (
        f"the calibration text gives {samples.tokens} of the 640000 tokens asked for; all of it is used",
    )


def test_as_many_windows_as_hold_the_tokens_asked_for(llama_model, prose):
    samples = drawn(llama_model, prose, length=64, samples=20)
    assert 20 * 64 <= samples.tokens < 21 * 64
    assert samples.notes == ()


def test_the_seed_draws(llama_model, prose):
    first, again, other = (drawn(llama_model, prose, length=64, samples=20, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.digest() == again.digest() != other.digest()
    assert set(first.windows) != set(other.windows)


def test_the_default_length_is_what_the_model_can_hold(llama_model, prose):
    """512, or the tiny model's 128."""
    assert drawn(llama_model, prose).length == 128
    assert refusal(llama_model, prose, length=129) == "--calibration-length 129: the model holds 128 tokens"


def test_large_documents_are_read_in_pieces(llama_model, tmp_path):
    """One document of 600 kB: windows come from several places, and every one is found in the whole."""
    lines = [f"line {number} of many\n" for number in range(30_000)]
    samples = drawn(llama_model, written(tmp_path, "".join(lines)), samples=600, length=128)
    tokenizer = load_tokenizer(llama_model)
    numbers = [int(tokenizer.decode(window[1:]).split("line ")[2].split()[0]) for window in samples.windows]
    assert max(numbers) - min(numbers) > 10_000


def test_the_bundled_text_is_large_varied_and_not_the_tests_own(llama_model, prose):
    text = DEFAULT_TEXT.read_text(encoding="utf-8")
    assert len(text) > 60_000
    assert text.isascii()
    samples = drawn(llama_model)
    assert samples.provenance()["text"] == "bundled"
    evaluation = set(drawn(llama_model, prose, samples=10_000).record()["fingerprint"])
    assert not evaluation & set(samples.record()["fingerprint"])


def test_gzipped_text_gives_what_plain_text_gives(llama_model, prose, tmp_path):
    packed = tmp_path / "prose.txt.gz"
    packed.write_bytes(gzip.compress(prose.read_bytes()))
    assert drawn(llama_model, packed).windows == drawn(llama_model, prose).windows


# JSON lines.


def json_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return path


@pytest.fixture
def chat_model(llama_model, tmp_path) -> Path:
    folder = tmp_path / "chat"
    shutil.copytree(llama_model, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def test_objects_of_text_are_documents(llama_model, prose, tmp_path):
    rows = [{"text": document, "source": "tests"} for document in read_documents(prose)]
    lines = json_lines(tmp_path / "text.jsonl", rows)
    assert set(drawn(llama_model, lines, samples=999).windows) == set(drawn(llama_model, prose, samples=999).windows)


def test_line_breaks_of_other_alphabets_part_no_rows(llama_model, prose, tmp_path):
    """JSON may hold U+2028 as it is; only the line feed parts rows."""
    path = tmp_path / "text.jsonl"
    text = "\u2028".join(read_documents(prose))
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    plain = tmp_path / "plain.txt"
    plain.write_text(text, encoding="utf-8")
    assert set(drawn(llama_model, path, samples=999).windows) == set(drawn(llama_model, plain, samples=999).windows)


def test_chats_are_rendered_by_the_models_template(chat_model, prose, tmp_path):
    """With one start token, as the template writes it, and the special tokens as single ids."""
    contents = [document[:150] for document in read_documents(prose)]
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]} for text in contents
    ]
    samples = drawn(chat_model, json_lines(tmp_path / "chat.jsonl", rows), samples=999)
    tokenizer = load_tokenizer(chat_model)
    (eos,) = tokenizer.eos
    expected = set()
    for text in contents:
        ids = tokenizer.encode(f"<s>[user] {text}\n[assistant] Yes.\n</s>", add_special_tokens=False)
        assert (ids[0], ids[-1], ids.count(tokenizer.bos)) == (tokenizer.bos, eos, 1)
        expected |= {(tokenizer.bos, *ids[1 + i : 128 + i]) for i in range(0, len(ids) - 1, 127) if len(ids) - i > 7}
    assert set(samples.windows) == expected


def test_chats_need_a_template(llama_model, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "Hello"}]}]
    path = json_lines(tmp_path / "chat.jsonl", rows)
    message = refusal(llama_model, path)
    assert message == f'{path}: line 1: holds "messages", and {llama_model} has no chat template; give plain "text"'


def test_a_template_that_refuses_is_quoted(chat_model, tmp_path):
    path = json_lines(tmp_path / "chat.jsonl", [{"messages": [{"role": "judge", "content": "Guilty"}]}])
    message = f"{path}: line 1: the model's chat template fails on these messages: no judges"
    assert refusal(chat_model, path) == message


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "is no JSON; each line must be one object"),
        ("[1]", "is no JSON object"),
        ('{"txt": "a"}', 'holds neither "text" nor "messages" with role and content'),
        ('{"messages": []}', 'holds neither "text" nor "messages" with role and content'),
        ('{"messages": [{"role": "user"}]}', 'holds neither "text" nor "messages" with role and content'),
    ],
)
def test_broken_lines_are_named(llama_model, line, problem, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")
    assert refusal(llama_model, path) == f"{path}: line 2: {problem}"


# Refusals.


def test_text_that_is_too_short(llama_model, tmp_path):
    path = written(tmp_path, "Just a few words.", "And a few more of them.")
    assert refusal(llama_model, path).startswith(f"{path}: too short to calibrate with: ")
    assert refusal(llama_model, path).endswith(" tokens, at least 512 are needed")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "holds no text"),
        (b" \n\n<|endoftext|>\n \n", "holds no text"),
        (b"\x7fELF\xff\xfe\x00\x01", "not UTF-8 text (byte 4); convert it to UTF-8 first"),
        (b"GIF89a\x00\x00\x00" * 500, "holds zero bytes: a binary file, no text"),
    ],
    ids=["empty", "blank", "not UTF-8", "zero bytes"],
)
def test_what_is_no_text(llama_model, content, problem, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    assert refusal(llama_model, path) == f"{path}: {problem}"


def test_a_file_that_is_not_there(llama_model, tmp_path):
    assert refusal(llama_model, tmp_path / "nothing.txt").startswith(f"{tmp_path / 'nothing.txt'}: cannot be read: ")


def test_numbers_that_make_no_sense():
    with pytest.raises(InputError, match="--calibration-samples 0: at least 1 is needed"):
        CalibrationRequest(samples=0)
    with pytest.raises(InputError, match="--calibration-length 15: at least 16 tokens are needed"):
        CalibrationRequest(length=15)
