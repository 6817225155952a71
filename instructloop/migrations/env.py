"""Alembic's entry: runs the migrations on the connection that `instructloop.database` hands over.

There is no alembic.ini and no offline mode: the application migrates its database when it starts.
"""

from alembic import context

context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
