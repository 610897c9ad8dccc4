"""The untrusted host of an edge server: it starts enclaves and moves sealed bytes.

Read in this order: served (what a gateway sees), fcfs (what to run next; pure), host (one model in
one enclave), link (the socket between host and enclave), release and broker (the model's keys).
"""
