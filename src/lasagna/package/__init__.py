"""The sealed package: what the owner writes and the enclave reads (docs/reference/package.md)."""
