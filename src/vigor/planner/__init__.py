"""Before a run: what a model needs and takes on given GPUs, and the cheapest set-up that fits. No weights are read."""
