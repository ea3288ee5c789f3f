"""Opening a model folder: names and shapes as the model has them, whatever the files do; one line for each fault."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import quantlab
from quantlab.checkpoint import open_checkpoint
from quantlab.checkpoint.families import FAMILIES
from quantlab.errors import InputError
from quantlab.formats import FORMATS

OWN_SCALES = [name for name, row in FORMATS.items() if row.scale_of == "block"]

LLAMA = {"model_type": "llama"}
GPT2 = {"model_type": "gpt2"}
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def folder_with(folder: Path, config: object, **files: dict[str, torch.Tensor]) -> Path:
    """A folder with this config.json and these files of tensors, by name without suffix."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def parameters_of(folder: Path) -> dict[str, torch.Tensor]:
    """The model's parameters as transformers loads them, those of GPT-2's Conv1D turned to [out, in]."""
    from transformers.pytorch_utils import Conv1D

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    return {name: p.detach().T if name in turned else p.detach() for name, p in model.named_parameters()}


def test_a_folder_holds_the_models_parameters(float_model: Path) -> None:
    """Names, shapes, element types, values and counts; a tied head is not listed, GPT-2's weights lie as [out, in]."""
    expected = parameters_of(float_model)
    checkpoint = open_checkpoint(float_model)
    assert set(checkpoint.names) == set(expected)
    for name, parameter in expected.items():
        assert checkpoint.shape(name) == tuple(parameter.shape)
        assert checkpoint.entry(name).dtype == "F32"
        assert checkpoint.format(name) is None
        assert torch.equal(checkpoint.read(name), parameter)
    assert checkpoint.parameters == sum(parameter.numel() for parameter in expected.values())
    assert checkpoint.nbytes == 4 * checkpoint.parameters
    assert checkpoint.tied == (HEAD not in expected)
    assert checkpoint.recipe is None


def test_gpt2_weights_are_turned_and_nothing_else_is(make_model, tmp_path: Path) -> None:
    """Worked example: c_attn of width 64 lies as [64, 192] in the file and reads as [192, 64]; a bias stays."""
    folder = make_model(tmp_path / "model", "gpt2")
    checkpoint = open_checkpoint(folder)
    stored = load_file(folder / "model.safetensors")
    name = "transformer.h.0.attn.c_attn"
    assert stored[f"{name}.weight"].shape == (64, 192)
    assert checkpoint.entry(f"{name}.weight").shape == checkpoint.shape(f"{name}.weight") == (192, 64)
    assert torch.equal(checkpoint.read(f"{name}.weight"), stored[f"{name}.weight"].T)
    assert checkpoint.read_bytes(f"{name}.weight").tobytes() == stored[f"{name}.weight"].T.numpy().tobytes()
    assert checkpoint.read_stored(f"{name}.weight").tobytes() == stored[f"{name}.weight"].numpy().tobytes()
    assert torch.equal(checkpoint.read(f"{name}.bias"), stored[f"{name}.bias"])
    assert checkpoint.shape("transformer.wpe.weight") == (128, 64)


@pytest.mark.parametrize(
    ("config", "prefix", "inner"),
    [(GPT2, "transformer.", "h.0.attn.c_attn.weight"), (LLAMA, "model.", "layers.0.self_attn.q_proj.weight")],
    ids=["gpt2", "llama"],
)
def test_names_get_the_prefix_that_a_bare_model_leaves_out(
    tmp_path: Path, config: dict[str, object], prefix: str, inner: str
) -> None:
    """The head, which has none, keeps its name; so does a name with the prefix."""
    bare = folder_with(tmp_path / "bare", config, model={inner: torch.ones(4, 4), HEAD: torch.ones(8, 4)})
    full = folder_with(tmp_path / "full", config, model={prefix + inner: torch.ones(4, 4), HEAD: torch.ones(8, 4)})
    assert set(open_checkpoint(bare).names) == set(open_checkpoint(full).names) == {prefix + inner, HEAD}
    assert torch.equal(open_checkpoint(bare).read(prefix + inner), torch.ones(4, 4))


def test_a_bare_gpt2_opens_like_the_whole(make_model, tmp_path: Path) -> None:
    """GPT-2's own files on the hub name no prefix."""
    whole = make_model(tmp_path / "whole", "gpt2")
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(whole / "model.safetensors").items()}
    config = json.loads((whole / "config.json").read_text())
    bare = folder_with(tmp_path / "bare", config, model=tensors)
    checkpoint = open_checkpoint(bare)
    assert set(checkpoint.names) == set(open_checkpoint(whole).names)
    for name in checkpoint.names:
        assert torch.equal(checkpoint.read(name), open_checkpoint(whole).read(name))


@pytest.mark.parametrize(
    ("config", "buffer", "shape"),
    [
        (GPT2, "h.1.attn.bias", (1, 1, 8, 8)),
        (GPT2, "transformer.h.1.attn.masked_bias", ()),
        (LLAMA, "model.layers.1.self_attn.rotary_emb.inv_freq", (8,)),
    ],
)
def test_buffers_that_the_model_computes_are_left_out(
    tmp_path: Path, config: dict[str, object], buffer: str, shape: tuple[int, ...]
) -> None:
    """Old files carry attention masks (also as bytes) and rotary frequencies."""
    for dtype in (torch.float32, torch.uint8):
        tensors = {buffer: torch.ones(shape, dtype=dtype), "lm_head.weight": torch.ones(4, 4)}
        folder = folder_with(tmp_path / str(dtype), config, model=tensors)
        assert open_checkpoint(folder).names == ("lm_head.weight",)


def test_a_stored_copy_of_the_embedding_is_no_second_tensor(tmp_path: Path) -> None:
    """Where config.json ties the head, an equal one in the file is dropped and counts once."""
    weight = torch.arange(12.0).reshape(4, 3)
    tensors = {EMBEDDING: weight, HEAD: weight.clone()}
    checkpoint = open_checkpoint(folder_with(tmp_path, {**LLAMA, "tie_word_embeddings": True}, model=tensors))
    assert (checkpoint.names, checkpoint.tied, checkpoint.parameters) == ((EMBEDDING,), True, 12)


def test_a_head_that_differs_from_the_embedding_counts(tmp_path: Path) -> None:
    """Whatever config.json says: transformers loads such a head too."""
    tensors = {EMBEDDING: torch.zeros(4, 3), HEAD: torch.ones(4, 3)}
    checkpoint = open_checkpoint(folder_with(tmp_path, {**LLAMA, "tie_word_embeddings": True}, model=tensors))
    assert set(checkpoint.names) == {EMBEDDING, HEAD}
    assert not checkpoint.tied


def test_an_untied_head_equal_to_the_embedding_stays(tmp_path: Path) -> None:
    """Llama's heads are untied unless config.json says otherwise, GPT-2's the other way round."""
    embedding = {"llama": EMBEDDING, "gpt2": "transformer.wte.weight"}
    tied = {}
    for model_type, name in embedding.items():
        tensors = {name: torch.ones(4, 3), HEAD: torch.ones(4, 3)}
        checkpoint = open_checkpoint(folder_with(tmp_path / model_type, {"model_type": model_type}, model=tensors))
        tied[model_type] = (checkpoint.tied, len(checkpoint.names))
    assert tied == {"llama": (False, 2), "gpt2": (True, 1)}


def test_shards_are_one_checkpoint(make_model, tmp_path: Path) -> None:
    """A folder that transformers saved in several files holds what the single file holds."""
    single = make_model(tmp_path / "single", "llama", tied=False)
    model = AutoModelForCausalLM.from_pretrained(single, dtype=torch.float32)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    one, many = open_checkpoint(single), open_checkpoint(tmp_path / "sharded")
    assert set(one.names) == set(many.names)
    assert (one.parameters, one.nbytes) == (many.parameters, many.nbytes)
    for name in one.names:
        assert torch.equal(one.read(name), many.read(name))


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_a_folder_with_legacy_bin_files_reads_alike(make_model, tmp_path: Path, sharded: bool) -> None:
    """pytorch_model.bin, alone or in shards, GPT-2's transposed weights included."""
    original = make_model(tmp_path / "original", "gpt2")
    legacy = tmp_path / "legacy"
    legacy.mkdir()
    shutil.copy(original / "config.json", legacy)
    tensors = load_file(original / "model.safetensors")
    if sharded:
        names = [f"pytorch_model-{i:05}-of-00002.bin" for i in (1, 2)]
        places = {name: names[number % 2] for number, name in enumerate(tensors)}
        for file in names:
            torch.save({name: t for name, t in tensors.items() if places[name] == file}, legacy / file)
        (legacy / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    else:
        torch.save(tensors, legacy / "pytorch_model.bin")
    one, other = open_checkpoint(original), open_checkpoint(legacy)
    assert set(one.names) == set(other.names)
    for name in one.names:
        assert one.shape(name) == other.shape(name)
        assert torch.equal(one.read(name), other.read(name))


def test_safetensors_come_before_bin_files(tmp_path: Path) -> None:
    """A folder with both is read from the former."""
    folder = folder_with(tmp_path, LLAMA, model={HEAD: torch.ones(2, 2)})
    torch.save({HEAD: torch.zeros(2, 2)}, folder / "pytorch_model.bin")
    assert torch.equal(open_checkpoint(folder).read(HEAD), torch.ones(2, 2))


def test_read_casts_when_asked(llama_model: Path) -> None:
    """To any element type, as torch rounds."""
    checkpoint = open_checkpoint(llama_model)
    assert torch.equal(checkpoint.read(QUERY, torch.bfloat16), checkpoint.read(QUERY).to(torch.bfloat16))


@pytest.mark.parametrize("format", OWN_SCALES)
def test_packed_tensors_speak_of_their_weights(float_model: Path, tmp_path: Path, format: str) -> None:
    """Shape, count and values are those of the weights, bytes those of the blocks; gguf decodes the same numbers."""
    import gguf

    quantlab.quantize_checkpoint(float_model, tmp_path / "out", format=format)
    source, checkpoint = open_checkpoint(float_model), open_checkpoint(tmp_path / "out")
    assert set(checkpoint.names) == set(source.names)
    assert checkpoint.parameters == source.parameters
    assert checkpoint.nbytes == sum(t.nbytes for t in load_file(tmp_path / "out" / "model.safetensors").values())
    packed = [name for name in checkpoint.names if checkpoint.format(name) is not None]
    assert {checkpoint.format(name).name for name in packed} == {format, "q8_0"}
    for name in packed:
        kind = gguf.GGMLQuantizationType[checkpoint.format(name).name.upper()]
        blocks = checkpoint.read_packed(name)
        decoded = gguf.quants.dequantize(blocks.blocks.numpy(), kind)
        assert checkpoint.shape(name) == blocks.shape == decoded.shape == source.shape(name)
        assert np.array_equal(checkpoint.read(name).numpy(), decoded)
        assert checkpoint.read(name, torch.float16).dtype == torch.float16


def test_a_plain_tensor_has_no_blocks(llama_model: Path) -> None:
    with pytest.raises(InputError, match=f"{llama_model}: tensor {QUERY} is not quantized"):
        open_checkpoint(llama_model).read_packed(QUERY)


def test_an_unknown_name_is_an_error_with_folder_and_name(llama_model: Path) -> None:
    checkpoint = open_checkpoint(llama_model)
    for question in (checkpoint.entry, checkpoint.shape, checkpoint.read, checkpoint.read_bytes):
        with pytest.raises(InputError, match=f"{llama_model}: holds no tensor model.none"):
            question("model.none")


# What is refused.


def test_an_index_with_a_missing_shard_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, LLAMA)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {HEAD: "model-00001-of-00002.safetensors"}}))
    assert refusal(folder) == f"{index}: names model-00001-of-00002.safetensors, which is missing; download it"


@pytest.mark.parametrize("outside", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "", ".", ".."])
def test_an_index_reads_nothing_outside_its_folder(tmp_path: Path, outside: str) -> None:
    """Also where the file is there."""
    save_file({HEAD: torch.ones(2, 2)}, tmp_path / "secret.safetensors")
    folder = folder_with(tmp_path / "model", LLAMA)
    (folder / "sub").mkdir()
    save_file({HEAD: torch.ones(2, 2)}, folder / "sub" / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {HEAD: outside}}))
    assert refusal(folder) == f"{index}: shard {outside!r} is no plain file name"


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {HEAD: 1}}])
def test_an_index_without_a_map_of_file_names_is_refused(tmp_path: Path, index: object) -> None:
    folder = folder_with(tmp_path, LLAMA)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert refusal(folder) == f"{path}: weight_map must be an object of tensor names and file names"


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    """Which of them counts, nobody could say."""
    shards = [f"model-{i:05}-of-00002" for i in (1, 2)]
    folder = folder_with(tmp_path, LLAMA)
    for shard in shards:
        save_file({HEAD: torch.ones(2, 2), shard: torch.ones(1)}, folder / f"{shard}.safetensors")
    weight_map = {HEAD: f"{shards[0]}.safetensors", "other": f"{shards[1]}.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert refusal(folder) == f"{folder / shards[1]}.safetensors: tensor {HEAD} is in {shards[0]}.safetensors too"


def test_a_tensor_with_and_without_prefix_is_refused(tmp_path: Path) -> None:
    """Both would be the same parameter."""
    folder = folder_with(
        tmp_path, GPT2, model={"wte.weight": torch.ones(2, 2), "transformer.wte.weight": torch.ones(2, 2)}
    )
    assert "tensor transformer.wte.weight is in model.safetensors too" in refusal(folder)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    save_file({HEAD: torch.ones(2, 2)}, tmp_path / "model.safetensors")
    assert refusal(tmp_path) == f"{tmp_path}: holds no config.json; is this a model folder?"


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, LLAMA)
    assert refusal(folder) == (
        f"{folder}: holds neither model.safetensors nor pytorch_model.bin, nor an index of shards"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON; download it again"),
        (b"{", "not valid JSON; download it again"),
        (b"\xff\xfe", "not valid JSON; download it again"),
        (b"[" * 50_000, "not valid JSON; download it again"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'"llama"', "not a JSON object"),
        (b"{}", "names no model_type; is this a language model's config.json?"),
        (b'{"model_type": ["llama"]}', "names no model_type; is this a language model's config.json?"),
        (b'{"model_type": "bert"}', f"model_type 'bert' is not supported; supported: {', '.join(FAMILIES)}"),
        (b'{"model_type": "llama", "quantization_config": []}', "quantization_config is no JSON object"),
        (
            b'{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}',
            "quantized by 'gptq', which quantlab does not read; use the original model",
        ),
        (
            b'{"model_type": "llama", "quantization_config": {"quant_method": "quantlab", "rules_version": 2}}',
            "rules_version is 2, this quantlab reads 1; upgrade it",
        ),
    ],
    ids=range(13),
)
def test_a_wrong_config_is_refused_with_its_name(tmp_path: Path, content: bytes, message: str) -> None:
    save_file({HEAD: torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(content)
    assert refusal(tmp_path) == f"{tmp_path / 'config.json'}: {message}"


def quantized(rules: list[list[str | None]]) -> dict[str, object]:
    return {**LLAMA, "quantization_config": {"quant_method": "quantlab", "rules_version": 1, "rules": rules}}


@pytest.mark.parametrize(
    "config", [LLAMA, quantized([]), quantized([["model.*", "q4_1"]]), quantized([[HEAD, None], ["*", "q4_1"]])]
)
def test_bytes_without_a_rule_are_refused(tmp_path: Path, config: dict[str, object]) -> None:
    """Nothing else says which format they have."""
    folder = folder_with(tmp_path, config, model={HEAD: torch.zeros(4, 20, dtype=torch.uint8)})
    assert refusal(folder) == (
        f"{folder / 'model.safetensors'}: tensor {HEAD}: holds bytes, and quantization_config in config.json gives it "
        "no format"
    )


@pytest.mark.parametrize("shape", [(4, 21), (4, 18), (4, 0), (80,), (2, 2, 20), ()])
def test_bytes_that_are_no_rows_of_whole_blocks_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """A Q4_1 block has 20 bytes."""
    folder = folder_with(tmp_path, quantized([["*", "q4_1"]]), model={HEAD: torch.zeros(shape, dtype=torch.uint8)})
    assert refusal(folder) == (
        f"{folder / 'model.safetensors'}: tensor {HEAD}: shape {list(shape)} is no rows of 20-byte blocks"
    )


def test_a_file_is_no_model_folder(llama_model: Path) -> None:
    file = llama_model / "model.safetensors"
    way_out = "give one, or the folder with config.json and the safetensors files"
    assert refusal(file) == f"{file}: is no GGUF file; {way_out}"


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == f"{tmp_path / 'none'}: no such folder or file"


def test_a_damaged_file_is_refused_with_its_name(llama_model: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert refusal(tmp_path / "model").startswith(f"{file}: tensor ")
