"""Where weights go and in which dtype, checked before anything is read."""

import torch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_device(device: str | torch.device) -> torch.device:
    """Give the device of a name, if this machine has it.

    Raises:
        ValueError: torch knows no such device, or this machine or this build of torch does not have it.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    # A build without CUDA raises AssertionError, other backends NotImplementedError or ModuleNotFoundError.
    except (RuntimeError, TypeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ValueError(
            f"device={str(device)!r} cannot be used here ({str(error).splitlines()[0][:120]}). Use 'cpu', or 'cuda' "
            f"on a machine with a GPU and a build of torch for it; this one is torch {torch.__version__}."
        ) from None
    return found


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse what is no dtype for weights.

    Raises:
        ValueError: Anything but float32, bfloat16, float16 and float64.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} is no dtype for weights; use one of {', '.join(map(str, _DTYPES))}.")
