"""Who may hold which key, and what a sealed byte may be used for.

Pure: no clock, socket, file, thread, logging or environment. The time and nonces come in as
arguments; the only randomness inside is that of key generation and HPKE in ``cryptography``.

========================  =============================================================
``encoding``              unambiguous bytes for key labels, associated data, signatures
``documents``             strict, size-limited JSON
``keys``                  secrets and the key schedule
``request``               client to service: the capsule with a request's secret
``records``               sealed rows of tensors: inputs, activations, outputs
``signing``, ``model_keys``   what the model's owner signs, and what they keep
``evidence``              what an enclave claims, and the evidence that it was an enclave
``release``               an enclave asks for a package's keys, and opens the answer
``policy``, ``verifier``  which enclaves are allowed; the steps of the verification
``grant``                 the key broker's answer
========================  =============================================================

The last two lines are for brokers and clients. An enclave needs none of them, so nothing is
imported here: what isn't imported isn't in the trusted computing base.
"""
