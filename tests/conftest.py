"""Tiny real models and a tokenizer, made once per run: the tests' only fixtures with a cost."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test touches the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Workers and the commands they start run side by side; threads of torch or numpy that wait by spinning would fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import pytest

PROSE = Path(__file__).parent / "data" / "prose.txt"

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ONE_HEAD_A_KEY = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
SHAPES = {
    "llama": SHAPE,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "mistral": {**SHAPE, "sliding_window": 8},
    "qwen2": SHAPE,
    "qwen3": {**SHAPE, "head_dim": 32},
    "gpt_neox": ONE_HEAD_A_KEY,
    "phi3": {**SHAPE, "pad_token_id": 0},
    "gemma2": {**SHAPE, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "gemma3_text": {**SHAPE, "num_hidden_layers": 6, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Workers run side by side; more threads each would only fight."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def prose() -> Path:
    """The project's own text, eight documents."""
    return PROSE


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a SentencePiece BPE of 512 pieces, in all its files."""
    from quantlab.training.corpus import read_documents
    from quantlab.training.vocabulary import train_sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(read_documents(PROSE), 512, folder, threads=1)
    return folder


@pytest.fixture(scope="session")
def make_model(tokenizer_folder: Path):
    """A function (folder, family, tied=True, **config) -> folder with a random fp32 model and the tokenizer.

    Embeddings are drawn wide, so that logits differ enough for argmax comparisons.
    """

    def make(folder: Path, family: str, *, tied: bool = True, seed: int = 0, **overrides: object) -> Path:
        import shutil

        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        settings = {**SHAPES[family], "vocab_size": 512, "tie_word_embeddings": tied, **overrides}
        config = AutoConfig.for_model(family, bos_token_id=1, eos_token_id=2, **settings)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, 0.15)
                elif not parameter.any():  # biases start at zero, where a dropped one would not show
                    parameter.normal_(0, 0.05)
        model.save_pretrained(folder)
        for file in tokenizer_folder.iterdir():
            shutil.copy(file, folder)
        return folder

    return make


MODEL_CASES = [("llama", True), ("llama", False), ("gpt2", True), ("gpt2", False)]


@pytest.fixture(scope="session", params=MODEL_CASES, ids=lambda case: f"{case[0]}-{'tied' if case[1] else 'untied'}")
def float_model(request: pytest.FixtureRequest, make_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of each family, tied and untied."""
    family, tied = request.param
    return make_model(tmp_path_factory.mktemp("float"), family, tied=tied)


@pytest.fixture(scope="session")
def llama_model(make_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny Llama, where one family is enough."""
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def float_twin():
    """A function (quantized folder, dtype) -> transformers' own float model, its weights decoded from the file by gguf.

    How many bytes a row has tells its format; nothing of quantlab is used.
    """

    def twin(folder: Path, dtype=None):
        import gguf
        import torch
        from safetensors.torch import load_file
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.pytorch_utils import Conv1D

        # By bytes per 256 weights.
        formats = {66: "TQ2_0", 144: "Q4_0", 160: "Q4_1", 176: "Q5_0", 192: "Q5_1", 272: "Q8_0"}
        config = AutoConfig.from_pretrained(folder)
        del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32).eval()
        for name, stored in load_file(folder / "model.safetensors").items():
            parameter = model.get_parameter(name)
            if stored.dtype == torch.uint8:
                transposed = isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
                columns = parameter.shape[0 if transposed else 1]
                kind = gguf.GGMLQuantizationType[formats[stored.shape[1] * 256 // columns]]
                weight = torch.from_numpy(gguf.quants.dequantize(stored.numpy(), kind))
                stored = weight.T if transposed else weight
            assert parameter.shape == stored.shape
            parameter.data.copy_(stored)
        return model

    return twin
