"""``python -m mova_kernels``: what is installed and what runs; ``python -m mova_kernels demo``: what it is good for."""

from __future__ import annotations

import argparse

from . import demo, info


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mova_kernels",
        description="Without a command: versions, devices, native builds, and which backend runs each op and why.",
    )
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    parser.set_defaults(main=info.main)
    commands = parser.add_subparsers(title="commands", metavar="")
    demo.add_arguments(commands.add_parser("demo", help=demo.SUMMARY, description=demo.SUMMARY))
    args = parser.parse_args()
    args.main(args)


if __name__ == "__main__":
    main()
