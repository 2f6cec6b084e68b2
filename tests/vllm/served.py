"""Tiny models in folders, as a server reads them, and prompts."""

from pathlib import Path

import torch

from tests.tiny import calibration_of, tiny, with_effects

BUFFER, SINKS = 16, 3  # so that most tokens of short prompts are packed


class Served:
    """A tiny model in a folder, and its calibration, not in the same folder: vLLM would read it as weights."""

    def __init__(self, folder: Path, architecture: str = "llama", **changes: object) -> None:
        self.folder, self.calibration = folder / "model", folder / "calibration.safetensors"
        sizes = {"head_dim": 32, "max_position_embeddings": 32768}
        self.network = tiny(architecture, **sizes | changes)
        self.network.save_pretrained(self.folder)
        with_effects(calibration_of(self.network)).save(self.calibration)

    def settings(self, retention: float, **more: object) -> dict:
        return {"calibration": str(self.calibration), "retention": retention, "buffer": BUFFER, "sinks": SINKS, **more}


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def prompts(*lengths: int) -> list[list[int]]:
    return [prompt(length, seed) for seed, length in enumerate(lengths)]
