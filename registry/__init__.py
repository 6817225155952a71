"""Which versions exist, which one should serve, and what happened to each."""
