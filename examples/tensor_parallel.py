"""SmolLM2 on three processes, each with a third of the heads and of the winnowed cache.

Run with ``torchrun --nproc-per-node 3 examples/tensor_parallel.py calibration.safetensors``, after ``calibration.save``
in one process; no GPU is needed.
"""

import sys

import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

import swan
from swan.evaluation.models import model_folder

transformers.utils.logging.disable_progress_bar()

folder = model_folder("smollm2-135m")  # 3 KV heads, so that 3 processes can share them
model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=3))
tokenizer = AutoTokenizer.from_pretrained(folder)
swan.attach(model, swan.Calibration.load(sys.argv[1]))  # each process takes the bases of its heads

inputs = tokenizer("The three states of matter are solid, liquid and", return_tensors="pt")
cache = swan.SwanCache(model, retention=0.33, buffer=8)
output = model.generate(**inputs, cache=cache, max_new_tokens=16, do_sample=False)

rank, held = dist.get_rank(), [None] * 3
dist.all_gather_object(held, (cache.winnowed[0].state.k_recent.shape[1], cache.nbytes))
if rank == 0:
    print(tokenizer.decode(output[0]))
    for rank, (heads, nbytes) in enumerate(held):
        print(f"process {rank}: {heads} KV head, {nbytes} bytes")
dist.destroy_process_group()
