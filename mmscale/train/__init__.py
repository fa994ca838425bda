"""Training: DeepSpeed's engine made equal over its stages, the loop, its policies, and what a run leaves behind."""
