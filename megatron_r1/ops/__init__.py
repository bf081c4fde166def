"""L1: fused operations with a plain-torch reference each."""
