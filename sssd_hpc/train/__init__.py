"""Training: the loop, its engine (DeepSpeed), its checkpoints and the moving average."""
