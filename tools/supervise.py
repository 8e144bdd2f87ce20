#!/usr/bin/env python3
"""Start a training job again when it fails, from its last checkpoint, a bounded number of times.

    tools/supervise.py --tries 5 -- torchrun --nproc-per-node 8 pretrain_sat.py ... --save DIR --load DIR

docs/nothing-lost.md says what counts as a failure, and which exit code comes out.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sat.supervision import Patience, Supervisor, folder_of

USAGE_ERROR = 2


def main(argv: Sequence[str]) -> int:
    """Do what the command line asks for. Returns the exit code; 2 for what cannot be done, said on stderr."""
    args = _parser().parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    try:
        patience = Patience(
            tries=args.tries,
            backoff_seconds=args.backoff_seconds,
            grace_seconds=args.grace_seconds,
            requeue_exit_code=args.requeue_exit_code,
        )
        folder = folder_of(command) if args.folder is None else Path(args.folder)
        return Supervisor(command, folder=folder, patience=patience, say=_say).run()
    except (ValueError, OSError) as error:
        sys.stderr.write(f"supervise.py: {error}\n")
        return USAGE_ERROR


def _say(line: str) -> None:
    sys.stderr.write(f"supervise.py: {line}\n")
    sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    default = Patience()
    made.add_argument("--tries", type=int, default=default.tries, help="failures in a row without a new checkpoint")
    made.add_argument("--backoff-seconds", type=float, default=default.backoff_seconds, help="wait after the first")
    made.add_argument("--grace-seconds", type=float, default=default.grace_seconds, help="for saving when asked to end")
    made.add_argument("--requeue-exit-code", type=int, default=default.requeue_exit_code, help="when asked to end")
    made.add_argument("--folder", help="of the checkpoints; the command's --save unless given")
    made.add_argument("command", nargs=argparse.REMAINDER, help="behind --")
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
