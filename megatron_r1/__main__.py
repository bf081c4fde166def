"""`python -m megatron_r1` is `megatron-r1`."""

from megatron_r1.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
