"""Alembic's entry: runs on the connection that ``gateway/migrations/run.py`` hands over."""

from alembic import context

from gateway.migrations.schema import metadata

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    render_as_batch=connection.dialect.name == "sqlite",
)
with context.begin_transaction():
    context.run_migrations()
