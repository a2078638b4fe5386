"""`python -m dllm_jax` is the command `dllm-jax`."""

import sys

from dllm_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
