"""FSDP2 over two CPU processes: packed weights shard like any parameter, and the loss stays the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantlab.calibration.quantize import quantize_checkpoint

pytest.importorskip("accelerate")

SCRIPT = '''
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from quantlab.checkpoint import open_checkpoint
from quantlab.loading import load_model
from quantlab.training.adapted_model import check_base, with_adapter
from quantlab.training.finetune_settings import FinetuneSettings
from quantlab.training.next_token_loss import computes_loss

torch.set_num_threads(1)
dist.init_process_group("gloo")
path, merge_aware = Path(sys.argv[1]), sys.argv[2] == "merge-aware"
settings = FinetuneSettings(rank=4, targets="all-linear", merge_aware=merge_aware, activations="float")
checkpoint = open_checkpoint(path)
ids = torch.arange(8, 40)[None]


def made():
    torch.manual_seed(0)
    model = load_model(path)
    computes_loss(model)
    return with_adapter(model, checkpoint, check_base(checkpoint, settings), settings)


def losses(model):
    """Three steps of SGD on the same batch everywhere, so that averaged gradients are each process's own."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, found = torch.optim.SGD(trained, lr=0.02), []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids) / 31
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


whole = losses(made())
model = made()
for layer in model.get_base_model().model.layers:
    fully_shard(layer)
fully_shard(model)
packed = [p for p in model.parameters() if p.dtype == torch.uint8]
assert packed and all(isinstance(p, DTensor) for p in packed)
assert all(p.to_local().shape[0] * 2 == p.shape[0] for p in packed)
sharded = losses(model)
assert whole[2] < whole[0]
torch.testing.assert_close(torch.tensor(sharded), torch.tensor(whole), rtol=1e-4, atol=0)
if dist.get_rank() == 0:
    print("equal", whole, sharded)
dist.destroy_process_group()
'''


@pytest.mark.parametrize("kind", ["lora", "merge-aware"])
def test_a_sharded_model_has_the_whole_ones_losses(kind: str, llama_model: Path, tmp_path: Path) -> None:
    quantize_checkpoint(llama_model, tmp_path / "base")
    (tmp_path / "shard.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "shard.py"), str(tmp_path / "base"), kind],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "equal" in done.stdout
