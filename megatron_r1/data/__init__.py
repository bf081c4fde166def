"""L2: tokenizers, shards, mixtures as functions (numpy)."""
