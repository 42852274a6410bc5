"""Assembly of the model from layers and kernels. Knows nothing of data or training."""
