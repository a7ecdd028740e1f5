"""How measurements are drawn: the only files that name TensorBoard."""
