"""The database's history, one file a step in `versions`; `instructloop.database.migrate` runs it."""
