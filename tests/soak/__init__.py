"""``python -m tests.soak``: a deployment under load while its parts are killed, then an audit."""
