"""The untrusted host of an edge server: it starts enclaves and moves sealed bytes.

Read in this order: served (what a gateway sees), host (one enclave and its models), driver (what
the scheduler of ``policy`` decides, carried out), costs (a package as the scheduler sees it), link
(the socket between host and enclave), release and broker (the models' keys).
"""
