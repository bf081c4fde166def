"""L4: composes stages into a recipe and runs them; knows no torch."""
