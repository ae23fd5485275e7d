"""What several test files share."""

import torch

import train_gpt as tg


def flat(stored: dict[str, tg.Stored]) -> dict[str, torch.Tensor]:
    """Every tensor of what an artifact stores, as "q.codes"; under the name alone if it is all that stands there."""
    return {name if item.form == "half" else f"{name}.{part}": tensor
            for name, item in stored.items() for part, tensor in item.parts.items()}
