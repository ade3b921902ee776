"""Which device and dtype a name stands for."""

import torch


def pick_device(name="auto", local_rank=0):
    """The torch device of `name`; auto: CUDA where there is one. Raises ValueError for one that cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are known here")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        torch.zeros(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device '{name}' cannot be used: {str(error).splitlines()[0]}") from None
    return device


def pick_dtype(name, device):
    """The torch dtype of the activations; auto and fp8: bfloat16 on CUDA, float32 elsewhere."""
    native = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, native if name in ("auto", "fp8") else name)
