"""L1: megatron-core behind one facade."""
