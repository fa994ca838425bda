"""From a pretrained model to a task of one's own, on pretraining's stream, trainer, checkpoints and exports."""
