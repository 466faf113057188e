"""Run inside vLLM's environment, as a script: what the parser of `vllm serve` makes of commands.

    vllm_parser.py ASKED.json    where ASKED is {name: [word, …]}, the words behind `vllm serve`

The last line is {name: {option: value}} of the options that pq writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

OPTIONS = (
    "model_tag",
    "max_model_len",
    "max_num_seqs",
    "tensor_parallel_size",
    "kv_cache_dtype",
    "dtype",
    "attention_backend",
)


def main() -> None:
    """Run as a script."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    parser = make_arg_parser(FlexibleArgumentParser())
    found = {}
    for name, words in asked.items():
        took = parser.parse_args(words)
        found[name] = {
            option: value if isinstance(value := getattr(took, option), int) else str(value)
            for option in OPTIONS
        }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
