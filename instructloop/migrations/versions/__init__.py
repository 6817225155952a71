"""One migration a file. Each stands for itself and imports no tables: they change, history doesn't."""
