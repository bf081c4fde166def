"""L0: errors, logging and progress, atomic files, seeds, the machine. Standard library, numpy, rich and psutil only."""
