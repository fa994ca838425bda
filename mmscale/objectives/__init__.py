"""The losses, and how they are differentiated on any number of ranks and micro-batches."""
