"""Train sub-billion reasoning models by the MobileLLM-R1 recipe, on megatron-core.

Importing this package imports nothing heavy: no torch, no megatron-core, no GPU.
"""

__version__ = "0.1.0"
