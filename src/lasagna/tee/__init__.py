"""How enclaves are started and measured: ``backend`` is the interface, beside it each kind."""
