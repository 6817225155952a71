"""The composition root: configuration, command line and the supervisor of local processes."""
