"""Training steps of MoVAdapter under DistributedDataParallel, for somebody who trains it on several processes or GPUs.

Each process has its own part of the batch, and its samples select other experts than those of the other process. DDP
needs no ``find_unused_parameters``: an expert that no sample of a process selected gets gradients of zero there.

    torchrun --standalone --nproc-per-node 2 examples/train_with_ddp.py
"""

import os

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector

from mova_kernels import MoVAdapter, MoVAdapterConfig

CONFIG = MoVAdapterConfig(
    in_channels=32, out_channels=48, num_heads=2, num_layers=2, topk=1, resolution=6, text_channels=16,
    expert_channels=(24, 40),
)  # fmt: skip
BATCH, STEPS = 4, 3


def batch(step: int, rank: int, num_ranks: int) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    """This process's part of a random batch: base, experts, routing, text and the targets."""
    generator = torch.Generator().manual_seed(step)

    def random(*shape: int) -> Tensor:
        whole = torch.randn(BATCH, *shape, generator=generator)
        return whole.chunk(num_ranks)[rank]

    base, text = random(CONFIG.num_tokens, CONFIG.in_channels), random(CONFIG.text_channels)
    experts = [random(16, channels) for channels in CONFIG.expert_channels]  # 4 x 4 tokens each
    # The first half of the batch selects the first expert, the second half the second one.
    routing = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1]]).bool().chunk(num_ranks)[rank]
    return base, experts, routing, text, random(CONFIG.num_output_tokens, CONFIG.out_channels)


def main() -> None:
    use_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_gpus else torch.device("cpu")
    distributed.init_process_group("nccl" if use_gpus else "gloo")
    rank, num_ranks = distributed.get_rank(), distributed.get_world_size()
    try:
        torch.manual_seed(0)
        adapter = MoVAdapter(CONFIG).to(device)
        model = DistributedDataParallel(adapter, device_ids=[device.index] if use_gpus else None)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(STEPS):
            base, experts, routing, text, target = batch(step, rank, num_ranks)
            fused = model(base.to(device), [x.to(device) for x in experts], routing, text.to(device))
            loss = (fused - target.to(device)).square().mean()
            optimizer.zero_grad()
            loss.backward()  # DDP averages the gradients of all processes
            optimizer.step()
            mean = loss.detach().clone()
            distributed.all_reduce(mean)
            if rank == 0:
                print(f"step {step} loss {mean.item() / num_ranks:.6f}", flush=True)

        parameters = parameters_to_vector(adapter.parameters()).detach()
        of_all = [torch.empty_like(parameters) for _ in range(num_ranks)]
        distributed.all_gather(of_all, parameters)
        if rank == 0:
            print("ranks with the parameters of rank 0:", [r for r in range(num_ranks) if of_all[r].equal(of_all[0])])
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
