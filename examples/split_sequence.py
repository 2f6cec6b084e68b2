"""One history over several processes: each attends to its own tokens, and the parts are merged.

Run with ``torchrun --nproc-per-node 2 examples/split_sequence.py``; no GPU is needed.
"""

import torch
import torch.distributed as dist

import swan

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)  # the same tensors everywhere, so that the result can be checked
q = torch.randn(1, 8, 1, 64)
k, v = torch.randn(2, 1, 2, 6000, 64)

layout = swan.Plan.for_retention(0.33, dims=[(64, 64)]).layers[0]
mine = [swan.pack(t.chunk(ranks, dim=2)[rank], side) for t, side in ((k, layout.keys), (v, layout.values))]

out, lse = swan.packed_attention(q, *mine, return_lse=True)  # of this process' tokens
outs, lses = [torch.empty_like(out) for _ in range(ranks)], [torch.empty_like(lse) for _ in range(ranks)]
dist.all_gather(outs, out)
dist.all_gather(lses, lse)
out, _ = swan.merge_attention(list(zip(outs, lses, strict=True)))

if rank == 0:
    whole = swan.packed_attention(q, swan.pack(k, layout.keys), swan.pack(v, layout.values))
    print(f"{k.shape[2] // ranks} tokens in each of {ranks} processes")
    sent = out.nbytes + lse.nbytes
    print(f"each sends {sent} bytes a step and holds {sum(p.nbytes for p in mine)}")
    print(f"largest difference from one process: {(out - whole).abs().max():.1e}")
dist.destroy_process_group()
