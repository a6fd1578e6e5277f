"""``python -m mova_kernels demo``: the adapter beside the dense computation of the official code, same weights.

Both sides run and are compared every time: no number that is printed or drawn was measured before.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from .comparison import DTYPES, OFFICIAL, QUICK, compare

SUMMARY = "run the adapter beside the dense computation of the official code; print and draw the comparison"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's options."""
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 on a CPU, bf16 on CUDA")
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="for mova-demo.png and .svg")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument("--quick", action="store_true", help="a toy size, to see that everything works")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> None:
    """Run, print, draw."""
    try:
        import matplotlib  # noqa: F401
        import tqdm  # noqa: F401
    except ModuleNotFoundError as error:
        sys.exit(f'the demo needs {error.name}: pip install "mova-kernels[demo]"')
    from .report import chart, text

    args.output.mkdir(parents=True, exist_ok=True)
    # The convolutions of the dense side are linear layers on ours: TF32 in one of the two would compare two dtypes.
    torch.backends.cudnn.allow_tf32 = False
    dtype = args.dtype or ("bf16" if args.device.type == "cuda" else "fp32")
    config, grids = QUICK if args.quick else OFFICIAL
    if args.quick:
        torch.set_num_threads(1)  # at that size more threads only wait for each other
    comparison = compare(config, grids, dtype, args.device, args.seed)
    print(text(comparison))
    print("chart:", *chart(comparison, args.output))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available()):
        return device
    raise argparse.ArgumentTypeError(f"must be cpu, or cuda where PyTorch sees such a device, got {name}")
