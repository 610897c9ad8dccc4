"""The Open Inference Protocol v2 over sealed records (docs/reference/http.md).

Read in this order: tensors (the wire format; pure), sealed (its tensors as an enclave's records),
service_class (who goes first; pure), metadata, body (what may come in), errors (which status an
error has), app (the routes).
"""
